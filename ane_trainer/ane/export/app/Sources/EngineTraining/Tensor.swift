import Foundation

/// A dense array of numbers with its shape: what weights are outside Core ML.
public struct Tensor: Equatable, Sendable {
    public var shape: [Int]
    public var values: [Float]

    public init(shape: [Int], values: [Float]) {
        precondition(values.count == shape.reduce(1, *), "The shape \(shape) needs \(shape.reduce(1, *)) values.")
        self.shape = shape
        self.values = values
    }

    /// Whether half precision holds every value: what comes from other devices may be infinite, or no number.
    public var fitsHalfPrecision: Bool {
        values.allSatisfy { Float16($0).isFinite }
    }

    /// The sum of `factor * term`, in double precision: a tensor that is kept in two half-precision terms.
    public static func folded(_ terms: [(values: [Float], factor: Double)], shape: [Int]) -> Tensor {
        let count = shape.reduce(1, *)
        let sums = (0..<count).map { i in
            terms.reduce(0.0) { $0 + Double($1.values[i]) * $1.factor }
        }
        return Tensor(shape: shape, values: sums.map(Float.init))
    }

    /// The two terms of a value: what half precision holds of it, and the rest divided by its factor.
    public static func split(_ value: Float, residualFactor: Double) -> (high: Float16, residual: Float16) {
        let high = Float16(value)
        return (high, Float16((Double(value) - Double(high)) / residualFactor))
    }
}

/// Federated averaging: the mean of several devices' weights, each counted as often as it has examples.
public enum Federated {
    public static func average(_ models: [(weights: [String: Tensor], examples: Int)]) throws -> [String: Tensor] {
        let total = models.reduce(0.0) { $0 + Double($1.examples) }
        guard let first = models.first, total > 0, models.allSatisfy({ $0.examples >= 0 }) else {
            throw TrainingError.nothingToAverage
        }
        var means: [String: Tensor] = [:]
        for (name, tensor) in first.weights {
            var sums = [Double](repeating: 0, count: tensor.values.count)
            for model in models {
                guard let other = model.weights[name], other.shape == tensor.shape else {
                    throw TrainingError.differentTensors(name)
                }
                let share = Double(model.examples) / total
                for (i, value) in other.values.enumerated() {
                    sums[i] += share * Double(value)
                }
            }
            means[name] = Tensor(shape: tensor.shape, values: sums.map(Float.init))
        }
        return means
    }
}
