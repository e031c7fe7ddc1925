import Foundation

public enum TrainingError: LocalizedError {
    case missingOutput(String)
    case missingResource(String)
    case wrongShape(String, expected: [Int], got: [Int])
    case differentTensors(String)
    case beyondHalfPrecision(String)
    case nothingToAverage
    case notSafetensors(URL)
    case unknownNumbers(String)

    public var errorDescription: String? {
        switch self {
        case .missingOutput(let name): "The model returned no \(name)."
        case .missingResource(let name): "The package holds no \(name)."
        case .wrongShape(let name, let expected, let got): "\(name) needs the shape \(expected); got \(got)."
        case .differentTensors(let name): "The tensor \(name) is not the same in all models."
        case .beyondHalfPrecision(let name): "\(name) holds numbers that half precision does not."
        case .nothingToAverage: "Averaging needs a model, and examples that count it."
        case .notSafetensors(let url): "\(url.lastPathComponent) is not a safetensors file."
        case .unknownNumbers(let type): "Numbers of the type \(type) cannot be read."
        }
    }
}
