import SwiftUI

#if os(macOS)
import AppKit
#endif

@main
struct DigitTrainerApp: App {
    @State private var trainer = TrainingModel()

    #if os(macOS)
    /// `swift run` starts the app without a bundle: it asks for its place in the Dock itself.
    init() {
        NSApplication.shared.setActivationPolicy(.regular)
        NSApplication.shared.activate(ignoringOtherApps: true)
    }
    #endif

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
