import CoreML
import Foundation

/// A training step that runs on the Neural Engine: each prediction is one update of the weights.
///
///     let step = try await TrainingStep.bundled()
///     for (images, labels) in batches {
///         let loss = try await step.train(["x": images, "y": labels])
///     }
///     try Safetensors.write(await step.weights(), to: url)
public actor TrainingStep {
    public nonisolated let manifest: Manifest

    /// Updates of the weights so far; batches so far; batches whose gradients did not fit and changed nothing.
    public private(set) var updates: Int
    public private(set) var batches: Int
    public private(set) var skipped = 0

    /// The optimizer's settings by parameter group.
    public private(set) var settings = Scalars.settings

    private let model: MLModel
    private var state: [String: MLShapedArray<Float16>]
    private var units: GradientUnits

    /// Loads a step: `model` is the exported `.mlpackage`, `state` the tensors that it starts from.
    public init(
        model: URL, manifest: URL, state: URL, computeUnits: MLComputeUnits = .cpuAndNeuralEngine
    ) async throws {
        let description = try Manifest(contentsOf: manifest)
        let configuration = MLModelConfiguration()
        configuration.computeUnits = computeUnits
        let compiled = try await MLModel.compileModel(at: model)
        self.model = try await MLModel.load(contentsOf: compiled, configuration: configuration)
        self.manifest = description
        self.state = try Safetensors.read(from: state).mapValues(MLShapedArray.init)
        units = GradientUnits(description)
        updates = description.appliedSteps
        batches = description.steps
    }

    /// The step that this package was exported with.
    public static func bundled(computeUnits: MLComputeUnits = .cpuAndNeuralEngine) async throws -> TrainingStep {
        try await TrainingStep(
            model: resource("step.mlpackage"), manifest: resource("step.json"),
            state: resource("step.safetensors"), computeUnits: computeUnits
        )
    }

    /// Trains on one batch, by port name, and returns its loss before the update.
    ///
    /// A batch whose gradients do not fit changes nothing but the loss scale. It runs again with units that moved,
    /// so that no update is lost.
    public func train(_ batch: [String: MLShapedArray<Float16>]) throws -> Double {
        let number = batches + 1
        let completes = number % manifest.policy.accumulate == 0
        let accumulated = manifest.port(of: "step/accumulated_fits").map { ($0, state[$0]) }
        var loss = 0.0
        var scaling: [String: MLShapedArray<Float16>] = [:]
        for attempt in 0..<manifest.policy.attempts {
            if attempt > 0, let (port, before) = accumulated { state[port] = before }
            let scalars = Scalars.values(
                update: updates + 1, settings: settings, units: units.values, shift: units.shift, last: completes
            )
            let results = try run(batch, scalars: scalars)
            batches = number  // one that does not fit the ports is not counted
            loss = try Double(array("loss", of: results).scalars[0]) / manifest.lossUnit
            let health = try array("health", of: results).scalars.map(Double.init)
            let limits = (scalars["gradient_limits"] ?? []).map { Double(Float16($0)) }
            let watched = units.observe(
                health: health, limits: limits, step: number, manifest: manifest, room: room
            )
            move(watched.moves)
            if watched.fits {
                if completes, try array("applied", of: results).scalars[0] > 0 {
                    updates += 1
                } else if completes {
                    skipped += 1  // a batch before this one did not fit
                }
                return loss
            }
            if attempt == 0 { scaling = state.filter { scalingPorts.contains($0.key) } }
            if !loss.isFinite { break }
        }
        state.merge(scaling) { $1 }  // where nothing fits, the loss scale is halved once
        if completes {
            skipped += 1
            dropAccumulated()
        }
        return loss
    }

    /// The trained parameters in single precision: each is the sum of two half-precision terms.
    public func weights() -> [String: Tensor] {
        manifest.weights.compactMapValues { terms in
            guard let shape = terms.first.flatMap({ state[$0.port]?.shape }) else { return nil }
            return Tensor.folded(
                terms.map { (state[$0.port]?.scalars.map(Float.init) ?? [], $0.factor) }, shape: shape
            )
        }
    }

    /// Changes the optimizer's settings from the next update on, for example for a learning-rate schedule:
    ///
    ///     await step.adjust { settings in settings[0].lr *= 0.5 }
    public func adjust(_ change: @Sendable (inout [Scalars.Settings]) -> Void) {
        change(&settings)
    }

    /// Takes over other weights, for example the average of several devices; those of all names, or none.
    public func setWeights(_ weights: [String: Tensor]) throws {
        var next = state
        for (name, tensor) in weights {
            guard let terms = manifest.weights[name], let high = terms.first, let old = state[high.port] else {
                throw TrainingError.differentTensors(name)
            }
            guard tensor.values.count == old.scalarCount else {
                throw TrainingError.wrongShape(name, expected: old.shape, got: tensor.shape)
            }
            guard tensor.fitsHalfPrecision else { throw TrainingError.beyondHalfPrecision(name) }
            let residual = terms.count > 1 ? terms[1] : nil
            let pairs = tensor.values.map { Tensor.split($0, residualFactor: residual?.factor ?? 1) }
            next[high.port] = MLShapedArray(scalars: pairs.map(\.high), shape: old.shape)
            if let residual {
                next[residual.port] = MLShapedArray(scalars: pairs.map(\.residual), shape: old.shape)
            }
        }
        state = next
    }

    /// The ports of the loss scale, its inverse and the count of good steps.
    private var scalingPorts: Set<String> {
        Set(["loss_scale", "loss_scale_inverse", "good_steps"].compactMap { manifest.port(of: "step/\($0)") })
    }

    /// The units of the gradients, by parameter.
    public var gradientUnits: [Double] { units.values }

    /// Half-precision weights for a `Classifier` that is exported beside the step, by port.
    public func halfPrecisionState() -> [String: MLShapedArray<Float16>] { state }

    // MARK: - Saving

    private struct Progress: Codable {
        let updates: Int
        let batches: Int
        let skipped: Int
        let units: GradientUnits
        let settings: [Scalars.Settings]
    }

    /// Writes all that training needs to go on, exactly: `state.safetensors` and `progress.json` in a folder.
    public func save(to folder: URL) throws {
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        try Safetensors.write(
            state.mapValues { Tensor(shape: $0.shape, values: $0.scalars.map(Float.init)) },
            to: folder.appending(path: "state.safetensors")
        )
        let progress = Progress(
            updates: updates, batches: batches, skipped: skipped, units: units, settings: settings
        )
        try JSONEncoder().encode(progress).write(to: folder.appending(path: "progress.json"), options: .atomic)
    }

    /// Goes on from what `save(to:)` wrote.
    public func resume(from folder: URL) throws {
        let data = try Data(contentsOf: folder.appending(path: "progress.json"))
        let progress = try JSONDecoder().decode(Progress.self, from: data)
        state = try Safetensors.read(from: folder.appending(path: "state.safetensors"))
            .mapValues(MLShapedArray.init)
        (updates, batches, skipped) = (progress.updates, progress.batches, progress.skipped)
        (units, settings) = (progress.units, progress.settings)
    }

    // MARK: - Details

    /// One prediction: feeds state, batch and scalars, and takes the next state.
    private func run(
        _ batch: [String: MLShapedArray<Float16>], scalars: [String: [Double]]
    ) throws -> MLFeatureProvider {
        var inputs = state.merging(batch) { _, new in new }
        for (target, values) in scalars {
            guard let port = manifest.port(of: target) else { continue }
            inputs[port] = MLShapedArray(scalars: values.map(Float16.init), shape: [values.count])
        }
        try check(inputs)
        let provider = try MLDictionaryFeatureProvider(
            dictionary: inputs.mapValues { MLFeatureValue(multiArray: MLMultiArray($0)) }
        )
        let results = try model.prediction(from: provider)
        for (output, input) in manifest.aliases {
            state[input] = try array(output, of: results)
        }
        return results
    }

    /// Empties the sums of gradients: the update that they were for is lost.
    private func dropAccumulated() {
        for port in manifest.inputs where port.target?.hasSuffix("/accumulated") == true {
            guard let old = state[port.name] else { continue }
            state[port.name] = MLShapedArray(repeating: 0, shape: old.shape)
        }
    }

    private func check(_ inputs: [String: MLShapedArray<Float16>]) throws {
        for port in manifest.inputs {
            guard let array = inputs[port.name] else {
                throw TrainingError.wrongShape(port.name, expected: port.shape, got: [])
            }
            guard array.shape == port.shape else {
                throw TrainingError.wrongShape(port.name, expected: port.shape, got: array.shape)
            }
        }
    }

    /// The largest power of two that a parameter's unit can grow by without its state leaving half precision.
    private func room(_ index: Int) -> Double {
        var exponent = 24.0
        for kept in manifest.parameters[index].inUnits {
            guard let values = manifest.port(of: kept.target).flatMap({ state[$0] })?.scalars else { continue }
            let peak = values.reduce(0) { max($0, abs(Double($1))) }
            if peak > 0 {
                let free = floor(log2(manifest.policy.movedPeak / peak))
                exponent = min(exponent, floor(free / Double(kept.power)))
            }
        }
        return max(exp2(exponent), 1)
    }

    private func move(_ moves: [GradientUnits.Move]) {
        for move in moves {
            for kept in manifest.parameters[move.parameter].inUnits {
                let factor = kept.target.hasSuffix("/accumulated") ? move.before : move.after
                guard factor != 1, let port = manifest.port(of: kept.target), let old = state[port] else { continue }
                let scale = Float(pow(factor, Double(kept.power)))
                state[port] = MLShapedArray(scalars: old.scalars.map { Float16(Float($0) * scale) }, shape: old.shape)
            }
        }
    }

    private func array(_ name: String, of results: MLFeatureProvider) throws -> MLShapedArray<Float16> {
        guard let value = results.featureValue(for: name)?.multiArrayValue else {
            throw TrainingError.missingOutput(name)
        }
        return MLShapedArray<Float16>(converting: value)
    }
}

func resource(_ name: String) throws -> URL {
    guard let url = Bundle.module.url(forResource: name, withExtension: nil, subdirectory: "Resources") else {
        throw TrainingError.missingResource(name)
    }
    return url
}

extension MLShapedArray where Scalar == Float16 {
    init(_ tensor: Tensor) {
        self.init(scalars: tensor.values.map(Float16.init), shape: tensor.shape)
    }
}
