import XCTest
@testable import EngineTraining

/// The arithmetic that needs no model, against numbers that the exporter's own Python computed (`Vectors`).
final class ArithmeticTests: XCTestCase {
    func testScalars() {
        for vector in Vectors.scalars {
            let values = Scalars.values(
                update: vector.update, settings: Scalars.settings, units: vector.units, shift: vector.shift, last: true
            )
            for (target, wanted) in vector.values {
                let got = values[target] ?? []
                XCTAssertEqual(got.count, wanted.count, target)
                for (a, b) in zip(got, wanted) {
                    XCTAssertEqual(a, b, accuracy: abs(b) * 1e-14, target)
                }
            }
        }
    }

    func testFolding() {
        for vector in Vectors.folding {
            let terms = [(values: vector.high, factor: 1.0), (values: vector.residual, factor: vector.factor)]
            XCTAssertEqual(Tensor.folded(terms, shape: [vector.high.count]).values, vector.folded)
            for (i, value) in vector.folded.enumerated() {
                let pair = Tensor.split(value, residualFactor: vector.factor)
                let sum = Double(pair.high) + Double(pair.residual) * vector.factor
                XCTAssertEqual(sum, Double(value), accuracy: abs(Double(value)) * 0x1p-20, "\(i)")
            }
        }
    }

    func testHalfPrecision() {
        XCTAssertTrue(Tensor(shape: [3], values: [1, -65504, 1e-30]).fitsHalfPrecision)
        for value in [Float.nan, .infinity, -70000] {
            XCTAssertFalse(Tensor(shape: [2], values: [1, value]).fitsHalfPrecision)
        }
    }

    func testAveraging() throws {
        for vector in Vectors.averaging {
            let models = zip(vector.models, vector.examples).map { values, count in
                (weights: ["w": Tensor(shape: [values.count], values: values)], examples: count)
            }
            XCTAssertEqual(try Federated.average(models)["w"]?.values, vector.mean)
        }
    }

    func testSafetensorsKeepWhatIsWritten() throws {
        let file = FileManager.default.temporaryDirectory.appending(path: "tensors.safetensors")
        let tensors = ["a": Tensor(shape: [2, 2], values: [1, -2.5, 0, 3e-8]), "b": Tensor(shape: [1], values: [7])]
        try Safetensors.write(tensors, to: file)
        XCTAssertEqual(try Safetensors.read(from: file), tensors)
    }

    func testDamagedFilesAreRefused() throws {
        let file = FileManager.default.temporaryDirectory.appending(path: "damaged.safetensors")
        try Safetensors.write(["a": Tensor(shape: [4], values: [1, 2, 3, 4])], to: file)
        let whole = try Data(contentsOf: file)
        let header = String(decoding: whole, as: UTF8.self)
        var damaged = [Data(), Data([255, 255, 255, 255, 255, 255, 255, 127]), whole.dropLast()]
        for (old, new) in [("[0,16]", "[0,99]"), ("[0,16]", "[9,-1]"), ("[4]", "[5]"), ("[0,16]", "[0,15]")] {
            let text = header.replacingOccurrences(of: old, with: new)
            XCTAssertNotEqual(text, header)
            damaged.append(whole.prefix(8) + Data(text.utf8.dropFirst(8)))
        }
        for data in damaged {
            try data.write(to: file)
            XCTAssertThrowsError(try Safetensors.read(from: file))
        }
    }

    func testAveragingNeedsTheSameTensors() {
        let one = ["w": Tensor(shape: [1], values: [1])], other = ["v": Tensor(shape: [1], values: [1])]
        XCTAssertThrowsError(try Federated.average([]))
        XCTAssertThrowsError(try Federated.average([(one, 0)]))
        XCTAssertThrowsError(try Federated.average([(one, 1), (other, 1)]))
    }
}
