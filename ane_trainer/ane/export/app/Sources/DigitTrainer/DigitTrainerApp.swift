import SwiftUI

@main
struct DigitTrainerApp: App {
    @State private var trainer = DigitTrainer()

    var body: some Scene {
        WindowGroup {
            TabView {
                TrainingView(trainer: trainer)
                    .tabItem { Label("Train", systemImage: "pencil.and.scribble") }
                ConformanceView()
                    .tabItem { Label("Conformance", systemImage: "checkmark.seal") }
            }
            .task { await trainer.load() }
        }
    }
}
