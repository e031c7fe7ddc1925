/// Stands in for Core ML where there is none: its types as `TrainingStep` uses them, a model that another process computes.
///
/// The folder in ANE_STAND_IN holds two named pipes: a request is a line of JSON (model, shapes by input) and the
/// inputs' half-precision numbers by name; the reply is a line of shapes and the outputs' numbers.
import Foundation

#if canImport(Glibc)
import Glibc

public func sysctlbyname(
    _ name: String, _ old: UnsafeMutableRawPointer?, _ size: UnsafeMutablePointer<Int>?, _ new: UnsafeRawPointer?,
    _ length: Int
) -> Int32 { -1 }
#endif

public protocol MLShapedArrayProtocol {
    associatedtype Scalar
    var shape: [Int] { get }
    var scalars: [Scalar] { get }
}

public struct MLShapedArray<Scalar>: MLShapedArrayProtocol {
    public let shape: [Int]
    public let scalars: [Scalar]
    public var scalarCount: Int { scalars.count }

    public init<S: Sequence>(scalars: S, shape: [Int]) where S.Element == Scalar {
        self.scalars = Array(scalars)
        self.shape = shape
        precondition(self.scalars.count == shape.reduce(1, *))
    }

    public init(repeating value: Scalar, shape: [Int]) {
        self.init(scalars: Array(repeating: value, count: shape.reduce(1, *)), shape: shape)
    }
}

extension MLShapedArray: Sendable where Scalar: Sendable {}

extension MLShapedArray where Scalar == Float16 {
    public init(converting array: MLMultiArray) {
        self.init(scalars: array.numbers, shape: array.shape.map(\.intValue))
    }
}

public final class MLMultiArray {
    public let shape: [NSNumber]
    let numbers: [Float16]

    public init<Array: MLShapedArrayProtocol>(_ array: Array) where Array.Scalar == Float16 {
        shape = array.shape.map { NSNumber(value: $0) }
        numbers = array.scalars
    }

    init(_ numbers: [Float16], _ shape: [Int]) {
        self.numbers = numbers
        self.shape = shape.map { NSNumber(value: $0) }
    }
}

public final class MLFeatureValue {
    public let multiArrayValue: MLMultiArray?

    public init(multiArray: MLMultiArray) { multiArrayValue = multiArray }
}

public protocol MLFeatureProvider {
    var featureNames: Set<String> { get }
    func featureValue(for name: String) -> MLFeatureValue?
}

public final class MLDictionaryFeatureProvider: MLFeatureProvider {
    private let values: [String: MLFeatureValue]

    public init(dictionary: [String: Any]) throws {
        values = dictionary.compactMapValues { $0 as? MLFeatureValue }
    }

    public var featureNames: Set<String> { Set(values.keys) }
    public func featureValue(for name: String) -> MLFeatureValue? { values[name] }
}

public enum MLComputeUnits: Sendable { case cpuOnly, cpuAndGPU, all, cpuAndNeuralEngine }

public final class MLModelConfiguration {
    public var computeUnits = MLComputeUnits.all
    public init() {}
}

public final class MLFeatureDescription {}

public final class MLModelDescription {
    public let inputDescriptionsByName: [String: MLFeatureDescription]

    init(_ names: [String]) {
        inputDescriptionsByName = Dictionary(uniqueKeysWithValues: names.map { ($0, MLFeatureDescription()) })
    }
}

public final class MLModel {
    public let modelDescription: MLModelDescription
    private let path: String

    private init(_ url: URL) throws {
        path = url.path
        modelDescription = MLModelDescription(try exchange(["model": path], []).shapes.keys.sorted())
    }

    public static func compileModel(at url: URL) async throws -> URL { url }

    public static func load(contentsOf url: URL, configuration: MLModelConfiguration) async throws -> MLModel {
        try MLModel(url)
    }

    public func prediction(from input: MLFeatureProvider) throws -> MLFeatureProvider {
        let names = input.featureNames.sorted()
        let arrays = names.compactMap { input.featureValue(for: $0)?.multiArrayValue }
        let shapes = Dictionary(uniqueKeysWithValues: zip(names, arrays.map { $0.shape.map(\.intValue) }))
        let reply = try exchange(["model": path, "inputs": shapes], arrays.map(\.numbers))
        return try MLDictionaryFeatureProvider(
            dictionary: reply.arrays.mapValues { MLFeatureValue(multiArray: $0) }
        )
    }

    public func prediction(from input: MLFeatureProvider) async throws -> MLFeatureProvider {
        let now: (MLFeatureProvider) throws -> MLFeatureProvider = prediction
        return try now(input)
    }
}

private struct Reply {
    let shapes: [String: [Int]]
    var arrays: [String: MLMultiArray] = [:]
}

private func exchange(_ request: [String: Any], _ arrays: [[Float16]]) throws -> Reply {
    let folder = URL(fileURLWithPath: ProcessInfo.processInfo.environment["ANE_STAND_IN"] ?? ".")
    let asked = try FileHandle(forWritingTo: folder.appendingPathComponent("request"))
    var data = try JSONSerialization.data(withJSONObject: request, options: [.sortedKeys])
    data.append(0x0A)
    for array in arrays { array.withUnsafeBytes { data.append(contentsOf: $0) } }
    try asked.write(contentsOf: data)
    try asked.close()
    let told = try FileHandle(forReadingFrom: folder.appendingPathComponent("reply")).readToEnd() ?? Data()
    let end = told.firstIndex(of: 0x0A) ?? told.endIndex
    let shapes = try JSONDecoder().decode([String: [Int]].self, from: told[..<end])
    var reply = Reply(shapes: shapes)
    var at = told.index(after: end)
    guard request["inputs"] != nil else { return reply }
    for (name, shape) in shapes.sorted(by: { $0.key < $1.key }) {
        let count = shape.reduce(1, *)
        let bytes = told[at..<at + 2 * count]
        let numbers = bytes.withUnsafeBytes { raw in
            (0..<count).map { raw.loadUnaligned(fromByteOffset: 2 * $0, as: Float16.self) }
        }
        reply.arrays[name] = MLMultiArray(numbers, shape)
        at += 2 * count
    }
    return reply
}
