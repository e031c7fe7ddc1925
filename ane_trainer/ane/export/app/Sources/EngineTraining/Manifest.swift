import Foundation

/// What the exporter wrote beside the model: what each port is, and how the optimizer is driven.
public struct Manifest: Codable, Sendable {
    public struct Port: Codable, Sendable {
        public let name: String
        public let role: String
        public let shape: [Int]
        public let target: String?
    }

    /// One summand of a tensor that is kept as two half-precision numbers.
    public struct Term: Codable, Sendable {
        public let port: String
        public let factor: Double
    }

    /// A state tensor that is kept in its parameter's unit, to this power.
    public struct StateInUnits: Codable, Sendable {
        public let target: String
        public let power: Int
    }

    public struct Parameter: Codable, Sendable {
        public let name: String
        public let group: Int
        public var unit: Double
        public var level: Double
        public let unitBounds: [Double]
        public let leastGradient: Double
        public let inUnits: [StateInUnits]

        enum CodingKeys: String, CodingKey {
            case name, group, unit, level
            case unitBounds = "unit_bounds"
            case leastGradient = "least_gradient"
            case inUnits = "in_units"
        }
    }

    /// When the unit of a gradient moves; see `GradientUnits`.
    public struct Policy: Codable, Sendable {
        public let peak: Double
        public let high: Double
        public let low: Double
        public let fade: Double
        public let upFirst: [Int]
        public let upEvery: Int
        public let movedPeak: Double
        public let accumulate: Int
        public let clipped: Bool
        /// Runs of one batch until its gradients fit.
        public let attempts: Int

        enum CodingKeys: String, CodingKey {
            case peak, high, low, fade, accumulate, clipped, attempts
            case upFirst = "up_first"
            case upEvery = "up_every"
            case movedPeak = "moved_peak"
        }
    }

    public let form: String
    public let inputs: [Port]
    public let outputs: [Port]
    /// Output name to input name: what the next call is given.
    public let aliases: [String: String]
    /// Parameter name to the terms whose sum is its value.
    public let weights: [String: [Term]]
    public let parameters: [Parameter]
    public let policy: Policy
    public let shift: Double
    public let lossUnit: Double
    public let appliedSteps: Int
    public let steps: Int

    enum CodingKeys: String, CodingKey {
        case form, inputs, outputs, aliases, weights, parameters, policy, shift, steps
        case lossUnit = "loss_unit"
        case appliedSteps = "applied_steps"
    }

    public init(contentsOf url: URL) throws {
        self = try JSONDecoder().decode(Manifest.self, from: Data(contentsOf: url))
    }

    /// The input port that mirrors a tensor of the model or the optimizer, or carries a scalar.
    public func port(of target: String) -> String? {
        inputs.first { $0.target == target }?.name
    }
}
