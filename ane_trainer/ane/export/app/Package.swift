// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "EngineTraining",
    platforms: [.iOS(.v17), .macOS(.v14)],
    products: [
        .library(name: "EngineTraining", targets: ["EngineTraining"]),
        .executable(name: "DigitTrainer", targets: ["DigitTrainer"]),
    ],
    targets: [
        .target(name: "EngineTraining", resources: [.copy("Resources")]),
        .executableTarget(name: "DigitTrainer", dependencies: ["EngineTraining"]),
        .testTarget(name: "EngineTrainingTests", dependencies: ["EngineTraining"]),
    ]
)
