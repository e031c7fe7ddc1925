import EngineTraining
import SwiftUI

/// Runs the comparison with the simulator on this device and shares the report.
struct ConformanceView: View {
    @State private var file: URL?
    @State private var message = "One step runs on this device and is compared with the simulator, bit for bit."
    @State private var isRunning = false

    var body: some View {
        VStack(spacing: 16) {
            Text(message).multilineTextAlignment(.center)
            Button("Run") {
                Task { await run() }
            }
            .buttonStyle(.borderedProminent)
            .disabled(isRunning)
            if let file {
                ShareLink("Share the report", item: file)
            }
        }
        .padding()
    }

    private func run() async {
        isRunning = true
        defer { isRunning = false }
        do {
            let report = try await Conformance.run()
            let path = URL.documentsDirectory.appending(path: "conformance-\(Machine.chipName)-coreml.json")
            try report.write(to: path, options: .atomic)
            file = path
            message = "The report is written. Please share it with the project."
        } catch {
            message = error.localizedDescription
        }
    }
}
