import CoreML
import Foundation

/// The model's forward pass, with the weights as inputs: it answers with the weights that the step has at the moment.
public actor Classifier {
    private let model: MLModel
    private let ports: Set<String>

    public init(model url: URL, computeUnits: MLComputeUnits = .cpuAndNeuralEngine) async throws {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = computeUnits
        let compiled = try await MLModel.compileModel(at: url)
        model = try await MLModel.load(contentsOf: compiled, configuration: configuration)
        ports = Set(model.modelDescription.inputDescriptionsByName.keys)
    }

    /// The one that this package was exported with.
    public static func bundled() async throws -> Classifier {
        try await Classifier(model: resource("predict.mlpackage"))
    }

    /// The outputs for one example.
    public func scores(
        of example: MLShapedArray<Float16>, weights: [String: MLShapedArray<Float16>]
    ) throws -> [Float] {
        var inputs = weights.filter { ports.contains($0.key) }
        inputs["x"] = example
        let provider = try MLDictionaryFeatureProvider(
            dictionary: inputs.mapValues { MLFeatureValue(multiArray: MLMultiArray($0)) }
        )
        guard let value = try model.prediction(from: provider).featureValue(for: "output")?.multiArrayValue else {
            throw TrainingError.missingOutput("output")
        }
        return MLShapedArray<Float16>(converting: value).scalars.map(Float.init)
    }
}
