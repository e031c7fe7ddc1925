import CoreML
import Foundation

/// Compares this device with the simulator, bit for bit: one call of the step, and a short run of training.
///
/// In the run one batch is too large for the units of its gradients, so that units move, batches run again and updates
/// may be skipped: what `TrainingStep` does is compared with what the trainer did.
///
/// The report has the form that `ane-trainer conformance` writes; `ane-trainer conformance-read` takes it.
public struct Conformance {
    private struct Difference {
        var count = 0
        var maxULP = 0
        var first: [[Any]] = []
    }

    /// What the trainer counted after each step of the recorded run; `loss` is nil where it was infinite.
    private struct Recorded: Decodable {
        struct Step: Decodable {
            let loss: Double?
            let updates: Int
            let skipped: Int
            let units: [Double]
        }

        let steps: [Step]
    }

    /// Cases that agree, by name with their number of values, and those that do not.
    private struct Comparison {
        var equal: [String: Int] = [:]
        var different: [[String: Any]] = []

        mutating func add(_ output: String, _ got: [Float16], _ want: [Float16]) {
            let name = "app: \(output)"
            let found = difference(got, want)
            if found.count == 0, got.count == want.count {
                equal[name] = want.count
            } else {
                different.append([
                    "case": name, "output": output, "values": want.count, "count": found.count,
                    "of": want.count, "max_ulp": found.maxULP, "first": found.first,
                ])
            }
        }
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
        var comparison = Comparison()
        for port in manifest.outputs {
            guard let want = vectors["out/\(port.name)"],
                  let value = results.featureValue(for: port.name)?.multiArrayValue else { continue }
            comparison.add(port.name, MLShapedArray<Float16>(converting: value).scalars, want.values.map(Float16.init))
        }
        try await repeatRun(manifest, into: &comparison)
        let (equal, different) = (comparison.equal, comparison.different)
        let report: [String: Any] = [
            "format": "ane_trainer conformance 1", "suite": 2, "machine": Machine.description, "machine_chip": chip,
            "device": ["name": "coreml", "chip": chip, "fidelity": "hardware"],
            "compared_with": ["name": "sim", "chip": Expected.chip, "fidelity": "exact"],
            "cases": equal.count + different.count, "equal": equal, "different": different,
            "failed": [String](), "skipped": [String](), "seconds": Date().timeIntervalSince(started),
        ]
        return try JSONSerialization.data(withJSONObject: report, options: [.sortedKeys])
    }

    /// Trains on the recorded batches and compares losses, counts, units and the state at the end.
    private static func repeatRun(_ manifest: Manifest, into comparison: inout Comparison) async throws {
        let recorded = try JSONDecoder().decode(Recorded.self, from: Data(contentsOf: resource("run.json")))
        let tensors = try Safetensors.read(from: resource("run.safetensors"))
        let step = try await TrainingStep.bundled()
        for (i, want) in recorded.steps.enumerated() {
            let batch = tensors.filter { $0.key.hasPrefix("\(i)/") }
            let named = Dictionary(uniqueKeysWithValues: batch.map { key, tensor in
                (String(key.drop { $0 != "/" }.dropFirst()), MLShapedArray<Float16>(tensor))
            })
            let loss = try await step.train(named)
            let name = "step \(i + 1) of a run"
            if let recordedLoss = want.loss {
                comparison.add("\(name), loss", [Float16(loss)], [Float16(recordedLoss)])
            }
            let counts = await [step.updates - manifest.appliedSteps, step.skipped]
            let expected = [want.updates - manifest.appliedSteps, want.skipped]
            comparison.add("\(name), updates and skips", counts.map(Float16.init), expected.map(Float16.init))
            let units = await step.gradientUnits
            comparison.add("\(name), units", units.map(exponent), want.units.map(exponent))
        }
        for (port, array) in await step.halfPrecisionState() {
            guard let want = tensors["state/\(port)"] else { continue }
            comparison.add("a run, \(port)", array.scalars, want.values.map(Float16.init))
        }
    }

    /// The exponent of a power of two, which half precision holds where it may not hold the power.
    private static func exponent(_ unit: Double) -> Float16 { Float16(log2(unit)) }

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
