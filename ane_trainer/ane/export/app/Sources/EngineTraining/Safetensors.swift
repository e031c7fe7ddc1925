import Foundation

/// Reads and writes `.safetensors` files: an 8-byte length, a JSON header, the tensors' bytes.
public enum Safetensors {
    private struct Entry: Codable {
        let dtype: String
        let shape: [Int]
        let offsets: [Int]

        enum CodingKeys: String, CodingKey {
            case dtype, shape
            case offsets = "data_offsets"
        }

        /// The tensor's bytes in a body of this size; nil where they lie outside of it. Files may come from others.
        func range(within size: Int) -> Range<Int>? {
            guard offsets.count == 2, offsets[0] >= 0, offsets[0] <= offsets[1], offsets[1] <= size else { return nil }
            return offsets[0]..<offsets[1]
        }

        /// The number of values of the shape; nil where no file holds as many.
        var count: Int? {
            shape.reduce(1) { product, side in
                guard let product, side >= 0 else { return nil }
                let (result, overflow) = product.multipliedReportingOverflow(by: side)
                return overflow ? nil : result
            }
        }
    }

    public static func read(from url: URL) throws -> [String: Tensor] {
        let data = try Data(contentsOf: url)
        guard data.count >= 8 else { throw TrainingError.notSafetensors(url) }
        let stated = data.prefix(8).enumerated().reduce(UInt64(0)) { $0 | UInt64($1.element) << (8 * $1.offset) }
        guard stated > 1, stated <= UInt64(data.count - 8) else { throw TrainingError.notSafetensors(url) }
        let length = Int(stated)
        let header = data.subdata(in: 8..<8 + length)
        guard var entries = try? JSONSerialization.jsonObject(with: header) as? [String: Any] else {
            throw TrainingError.notSafetensors(url)
        }
        entries.removeValue(forKey: "__metadata__")
        return try entries.mapValues { value in
            let described = try JSONSerialization.data(withJSONObject: value)
            let entry = try JSONDecoder().decode(Entry.self, from: described)
            guard let range = entry.range(within: data.count - 8 - length) else { throw TrainingError.notSafetensors(url) }
            let body = data.subdata(in: 8 + length + range.lowerBound..<8 + length + range.upperBound)
            let values = try numbers(body, dtype: entry.dtype)
            guard entry.count == values.count else { throw TrainingError.notSafetensors(url) }
            return Tensor(shape: entry.shape, values: values)
        }
    }

    public static func write(_ tensors: [String: Tensor], to url: URL) throws {
        var body = Data()
        var header: [String: Any] = [:]
        for (name, tensor) in tensors.sorted(by: { $0.key < $1.key }) {
            let start = body.count
            for value in tensor.values {
                withUnsafeBytes(of: value.bitPattern.littleEndian) { body.append(contentsOf: $0) }
            }
            header[name] = ["dtype": "F32", "shape": tensor.shape, "data_offsets": [start, body.count]] as [String: Any]
        }
        var text = try JSONSerialization.data(withJSONObject: header, options: [.sortedKeys])
        text.append(Data(repeating: 0x20, count: (8 - text.count % 8) % 8))
        var file = Data()
        withUnsafeBytes(of: UInt64(text.count).littleEndian) { file.append(contentsOf: $0) }
        file.append(text)
        file.append(body)
        try file.write(to: url, options: .atomic)
    }

    private static func numbers(_ data: Data, dtype: String) throws -> [Float] {
        switch dtype {
        case "F16":
            return words(data, of: UInt16.self).map { Float(Float16(bitPattern: UInt16(littleEndian: $0))) }
        case "F32":
            return words(data, of: UInt32.self).map { Float(bitPattern: UInt32(littleEndian: $0)) }
        default:
            throw TrainingError.unknownNumbers(dtype)
        }
    }

    private static func words<Word>(_ data: Data, of type: Word.Type) -> [Word] {
        data.withUnsafeBytes { bytes in
            (0..<bytes.count / MemoryLayout<Word>.size).map {
                bytes.loadUnaligned(fromByteOffset: $0 * MemoryLayout<Word>.size, as: Word.self)
            }
        }
    }
}
