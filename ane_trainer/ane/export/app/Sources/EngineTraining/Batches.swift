import CoreML

/// Examples that are collected one by one and come out in shuffled batches of one size.
public struct Batches {
    public let size: Int
    public let shape: [Int]
    public private(set) var examples: [(x: [Float16], y: Float16)] = []

    /// - Parameter shape: the shape of one example, without the batch.
    public init(size: Int, shape: [Int]) {
        self.size = size
        self.shape = shape
    }

    public mutating func append(x: [Float16], y: Int) {
        precondition(x.count == shape.reduce(1, *), "An example needs the shape \(shape).")
        examples.append((x, Float16(y)))
    }

    /// One pass over the examples in random order; the last batch is filled up with examples from the start.
    public func shuffled<Generator: RandomNumberGenerator>(
        using generator: inout Generator
    ) -> [[String: MLShapedArray<Float16>]] {
        guard !examples.isEmpty else { return [] }
        let order = examples.indices.shuffled(using: &generator)
        return stride(from: 0, to: order.count, by: size).map { start in
            let chosen = (0..<size).map { examples[order[(start + $0) % order.count]] }
            return [
                "x": MLShapedArray(scalars: chosen.flatMap(\.x), shape: [size] + shape),
                "y": MLShapedArray(scalars: chosen.map(\.y), shape: [size]),
            ]
        }
    }
}
