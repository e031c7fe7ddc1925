import Charts
import SwiftUI

struct TrainingView: View {
    let trainer: TrainingModel
    @State private var drawing = Drawing()
    @State private var label = 0

    var body: some View {
        VStack(spacing: 16) {
            DrawingView(drawing: $drawing)
                .frame(maxWidth: 320, maxHeight: 320)
            Picker("Digit", selection: $label) {
                ForEach(0..<10, id: \.self) { Text("\($0)") }
            }
            .pickerStyle(.segmented)
            HStack {
                Button("Add", systemImage: "plus") {
                    trainer.add(drawing, label: label)
                    drawing = Drawing()
                }
                Button("Recognize", systemImage: "questionmark") {
                    Task { await trainer.classify(drawing) }
                }
                Button("Clear", systemImage: "xmark") { drawing = Drawing() }
            }
            .disabled(drawing.isEmpty)
            if let answer = trainer.answer {
                Text("This is a \(answer).").font(.title2)
            }
            Button("Train on \(trainer.examples) examples") {
                Task { await trainer.train() }
            }
            .buttonStyle(.borderedProminent)
            .disabled(trainer.examples == 0 || trainer.isTraining)
            Chart(Array(trainer.losses.enumerated()), id: \.offset) { item in
                LineMark(x: .value("Step", item.offset + 1), y: .value("Loss", item.element))
            }
            .frame(height: 120)
            if let file = trainer.weightsFile {
                ShareLink("Share the weights", item: file)
            }
            if let message = trainer.message {
                Text(message).foregroundStyle(.red)
            }
        }
        .padding()
    }
}

/// A square to draw a digit in.
struct DrawingView: View {
    @Binding var drawing: Drawing

    var body: some View {
        GeometryReader { geometry in
            let side = min(geometry.size.width, geometry.size.height)
            Canvas { context, size in
                let cell = size.width / Double(Drawing.side)
                for (i, ink) in drawing.pixels.enumerated() where ink > 0 {
                    let origin = CGPoint(x: Double(i % Drawing.side) * cell, y: Double(i / Drawing.side) * cell)
                    let square = CGRect(origin: origin, size: CGSize(width: cell, height: cell))
                    context.fill(Path(square), with: .color(.white.opacity(ink)))
                }
            }
            .background(.black)
            .frame(width: side, height: side)
            .gesture(
                DragGesture(minimumDistance: 0).onChanged { drag in
                    drawing.paint(at: CGPoint(x: drag.location.x / side, y: drag.location.y / side))
                }
            )
        }
        .aspectRatio(1, contentMode: .fit)
    }
}
