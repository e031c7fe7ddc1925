import Foundation

/// The units of the gradients, powers of two that follow their sizes so that half precision holds them.
///
/// The model returns the largest magnitude of each gradient in its unit (`health`). One that is beyond what the
/// update takes makes the model skip the update; its unit then moves down and the batch runs again. Units whose
/// gradients have become small move up. What the optimizer keeps in a unit is scaled along. Nothing is compiled again.
public struct GradientUnits: Codable, Equatable, Sendable {
    /// A parameter's state is to be multiplied: by `before` where it is kept before clipping, else by `after`.
    public struct Move: Equatable, Sendable {
        public let parameter: Int
        public let before: Double
        public let after: Double
    }

    public private(set) var values: [Double]
    public private(set) var levels: [Double]
    public private(set) var shift: Double
    public private(set) var shiftLevel = 1.0

    public init(_ manifest: Manifest) {
        values = manifest.parameters.map(\.unit)
        levels = manifest.parameters.map(\.level)
        shift = manifest.shift
    }

    /// The moves that the health of a run asks for, and whether its gradients fitted; the units are those after them.
    ///
    /// - Parameters:
    ///   - limits: the largest gradients that the update takes, as they were fed.
    ///   - step: the number of this batch, from 1.
    ///   - room: the factor by which a parameter's state can be scaled within half precision.
    public mutating func observe(
        health: [Double], limits: [Double], step: Int, manifest: Manifest, room: (Int) -> Double
    ) -> (moves: [Move], fits: Bool) {
        let policy = manifest.policy
        let count = values.count
        guard health[count] > 0 else { return ([], false) }  // the loss scale was halved instead; it is state
        let up = policy.upFirst.contains(step) || step % policy.upEvery == 0
        var wanted = (0..<count).map { i in
            factor(of: i, peak: health[i], limit: limits[i], up: up, manifest: manifest)
        }
        var shiftFactor = policy.clipped ? shiftFactor(health[count + 1], up: up, manifest: manifest) : 1.0
        if shiftFactor > 1 {
            shiftFactor = min(shiftFactor, (0..<count).map(room).min() ?? 1)
        }
        for i in 0..<count where wanted[i] > 1 {
            wanted[i] = min(wanted[i], max(1, room(i) / max(shiftFactor, 1)))
        }
        let near = !policy.clipped || health[count + 2] > 0  // of a size that the update takes after clipping
        let fits = near && zip(health, limits).allSatisfy { $0 < $1 }
        return (moved(by: wanted, shiftFactor: shiftFactor), fits)
    }

    private mutating func factor(
        of index: Int, peak: Double, limit: Double, up: Bool, manifest: Manifest
    ) -> Double {
        let policy = manifest.policy
        let parameter = manifest.parameters[index]
        if peak > 0 {
            levels[index] = peak.isFinite ? max(peak, policy.fade * levels[index]) : 65504
        }
        var level = levels[index]
        if level == 0 { return 1 }
        if level <= policy.high, peak < limit, level >= policy.low || !up { return 1 }
        let unit = values[index]
        level = max(level, parameter.leastGradient * unit * shift)
        let target = unit * exp2(floor(log2(policy.peak / level)))
        return min(max(target, parameter.unitBounds[0]), parameter.unitBounds[1]) / unit
    }

    private mutating func shiftFactor(_ clipping: Double, up: Bool, manifest: Manifest) -> Double {
        shiftLevel = max(clipping, manifest.policy.fade * shiftLevel)
        if shiftLevel <= 2, shiftLevel >= 0.125 || !up { return 1 }
        let target = shift * exp2(-floor(log2(shiftLevel)))
        let largest = zip(manifest.parameters, values).reduce(32768.0) { least, pair in
            let decay = pair.0.leastGradient * pair.1
            let room = decay > 0 ? exp2(floor(log2(manifest.policy.high / decay))) : .infinity
            return min(least, max(pair.0.unitBounds[1], 1) / pair.1, room)
        }
        return max(1, min(target, max(largest, 1))) / shift
    }

    private mutating func moved(by wanted: [Double], shiftFactor: Double) -> [Move] {
        shift *= shiftFactor
        shiftLevel *= shiftFactor
        var moves: [Move] = []
        for (i, factor) in wanted.enumerated() {
            values[i] *= factor
            levels[i] *= factor
            if factor != 1 || shiftFactor != 1 {
                moves.append(Move(parameter: i, before: factor, after: factor * shiftFactor))
            }
        }
        return moves
    }
}
