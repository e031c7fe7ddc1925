import Foundation

/// A drawing of 28 by 28 pixels, white strokes on black, as in MNIST.
struct Drawing: Equatable {
    static let side = 28

    private(set) var pixels = [Double](repeating: 0, count: side * side)

    var isEmpty: Bool { pixels.allSatisfy { $0 == 0 } }

    /// Paints a soft round brush at a point of the unit square.
    mutating func paint(at point: CGPoint) {
        let (column, row) = (point.x * Double(Self.side), point.y * Double(Self.side))
        for y in max(0, Int(row) - 2)...min(Self.side - 1, max(0, Int(row) + 2)) {
            for x in max(0, Int(column) - 2)...min(Self.side - 1, max(0, Int(column) + 2)) {
                let distance = hypot(Double(x) + 0.5 - column, Double(y) + 0.5 - row)
                let ink = min(1, max(0, 2 - distance))
                pixels[y * Self.side + x] = max(pixels[y * Self.side + x], ink)
            }
        }
    }

    /// The pixels with MNIST's mean and deviation, as training had them.
    func normalized() -> [Double] {
        pixels.map { ($0 - 0.1307) / 0.3081 }
    }
}
