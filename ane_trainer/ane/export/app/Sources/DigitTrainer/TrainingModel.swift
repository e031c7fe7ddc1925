import CoreML
import EngineTraining
import Foundation
import Observation

/// Collects drawn digits, trains the step on them, and says what it takes a drawing for.
@MainActor
@Observable
final class TrainingModel {
    private(set) var examples = 0
    private(set) var losses: [Double] = []
    private(set) var answer: Int?
    private(set) var isTraining = false
    private(set) var message: String?
    private(set) var weightsFile: URL?

    private var step: TrainingStep?
    private var classifier: Classifier?
    private var batches: Batches?
    private var generator = SystemRandomNumberGenerator()

    func load() async {
        await attempt {
            let step = try await TrainingStep.bundled()
            guard let shape = step.manifest.inputs.first(where: { $0.name == "x" })?.shape else {
                throw TrainingError.missingOutput("x")
            }
            guard shape.dropFirst().reduce(1, *) == Drawing.side * Drawing.side else {
                throw TrainingError.wrongShape("x", expected: [1, Drawing.side, Drawing.side], got: Array(shape.dropFirst()))
            }
            batches = Batches(size: shape[0], shape: Array(shape.dropFirst()))
            classifier = try await Classifier.bundled()
            self.step = step
        }
    }

    func add(_ drawing: Drawing, label: Int) {
        batches?.append(x: drawing.normalized().map(Float16.init), y: label)
        examples = batches?.examples.count ?? 0
    }

    func train(epochs: Int = 10) async {
        guard let step, let batches else { return }
        isTraining = true
        defer { isTraining = false }
        await attempt {
            for _ in 0..<epochs {
                for batch in batches.shuffled(using: &generator) {
                    losses.append(try await step.train(batch))
                }
            }
            let file = URL.documentsDirectory.appending(path: "digits.safetensors")
            try Safetensors.write(await step.weights(), to: file)
            try await step.save(to: URL.documentsDirectory.appending(path: "training"))
            weightsFile = file
        }
    }

    func classify(_ drawing: Drawing) async {
        guard let step, let classifier, let batches else { return }
        await attempt {
            let x = MLShapedArray(scalars: drawing.normalized().map(Float16.init), shape: [1] + batches.shape)
            let scores = try await classifier.scores(of: x, weights: step.halfPrecisionState())
            answer = scores.indices.max { scores[$0] < scores[$1] }
        }
    }

    /// Goes on with the mean of this device's weights and another's, each weighted by its examples.
    func average(with other: URL, examples count: Int) async {
        guard let step else { return }
        await attempt {
            let theirs = try Safetensors.read(from: other)
            try await step.setWeights(Federated.average([(await step.weights(), max(examples, 1)), (theirs, count)]))
        }
    }

    private func attempt(_ work: () async throws -> Void) async {
        do {
            try await work()
            message = nil
        } catch {
            message = error.localizedDescription
        }
    }
}
