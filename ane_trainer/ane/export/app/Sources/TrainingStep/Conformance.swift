import CoreML
import Foundation

/// Compares one call of the step on this device with what the simulator computed for it, bit for bit.
///
/// The report has the form that `ane-trainer conformance` writes; `ane-trainer conformance-read` takes it.
public struct Conformance {
    private struct Difference {
        var count = 0
        var maxULP = 0
        var first: [[Any]] = []
    }

    /// Runs the call that was exported with the package and returns the report as JSON.
    public static func run(chip: String = Machine.chipName) async throws -> Data {
        let started = Date()
        let manifest = try Manifest(contentsOf: resource("step.json"))
        let vectors = try Safetensors.read(from: resource("conformance.safetensors"))
        let configuration = MLModelConfiguration()
        configuration.computeUnits = .cpuAndNeuralEngine
        let compiled = try await MLModel.compileModel(at: resource("step.mlpackage"))
        let model = try await MLModel.load(contentsOf: compiled, configuration: configuration)
        let inputs = vectors.filter { $0.key.hasPrefix("in/") }
        let provider = try MLDictionaryFeatureProvider(
            dictionary: Dictionary(uniqueKeysWithValues: inputs.map { key, tensor in
                (String(key.dropFirst(3)), MLFeatureValue(multiArray: MLMultiArray(MLShapedArray<Float16>(tensor))))
            })
        )
        let results = try await model.prediction(from: provider)
        var equal: [String: Int] = [:]
        var different: [[String: Any]] = []
        for port in manifest.outputs {
            guard let want = vectors["out/\(port.name)"],
                  let value = results.featureValue(for: port.name)?.multiArrayValue else { continue }
            let name = "app: \(port.name)"
            let found = difference(MLShapedArray<Float16>(converting: value).scalars, want.values.map(Float16.init))
            if found.count == 0 {
                equal[name] = want.values.count
            } else {
                different.append([
                    "case": name, "output": port.name, "values": want.values.count, "count": found.count,
                    "of": want.values.count, "max_ulp": found.maxULP, "first": found.first,
                ])
            }
        }
        let report: [String: Any] = [
            "format": "ane_trainer conformance 1", "suite": 2, "machine": Machine.description, "machine_chip": chip,
            "device": ["name": "coreml", "chip": chip, "fidelity": "hardware"],
            "compared_with": ["name": "sim", "chip": Expected.chip, "fidelity": "exact"],
            "cases": equal.count + different.count, "equal": equal, "different": different,
            "failed": [String](), "skipped": [String](), "seconds": Date().timeIntervalSince(started),
        ]
        return try JSONSerialization.data(withJSONObject: report, options: [.sortedKeys])
    }

    private static func difference(_ got: [Float16], _ want: [Float16]) -> Difference {
        var found = Difference()
        for (i, pair) in zip(got, want).enumerated() where pair.0.bitPattern != pair.1.bitPattern {
            found.count += 1
            found.maxULP = max(found.maxULP, abs(ordered(pair.0) - ordered(pair.1)))
            if found.first.count < 3 {
                found.first.append([i, hexadecimal(pair.0), hexadecimal(pair.1)])
            }
        }
        return found
    }

    /// Bit patterns as integers in the order of the numbers, with both zeros at 0.
    private static func ordered(_ value: Float16) -> Int {
        let bits = Int(value.bitPattern)
        return bits < 0x8000 ? bits : 0x8000 - bits
    }

    private static func hexadecimal(_ value: Float16) -> String {
        let digits = String(value.bitPattern, radix: 16)
        return String(repeating: "0", count: 4 - digits.count) + digits
    }
}

/// What this device says of itself.
public enum Machine {
    public static var brand: String? { string("machdep.cpu.brand_string") }

    /// "Apple M4 Pro" as the chip table writes it: m4-pro.
    public static var chipName: String {
        (brand ?? string("hw.machine") ?? "unknown").lowercased()
            .replacingOccurrences(of: "apple ", with: "").replacingOccurrences(of: " ", with: "-")
    }

    public static var description: [String: Any] {
        let version = ProcessInfo.processInfo.operatingSystemVersion
        return [
            "system": "Darwin", "release": "\(version.majorVersion).\(version.minorVersion).\(version.patchVersion)",
            "build": string("kern.osversion") ?? "", "chip": brand ?? "", "model": string("hw.machine") ?? "",
            "cores": ProcessInfo.processInfo.processorCount,
        ]
    }

    private static func string(_ name: String) -> String? {
        var size = 0
        guard sysctlbyname(name, nil, &size, nil, 0) == 0, size > 0 else { return nil }
        var bytes = [CChar](repeating: 0, count: size)
        guard sysctlbyname(name, &bytes, &size, nil, 0) == 0 else { return nil }
        return String(cString: bytes)
    }
}
