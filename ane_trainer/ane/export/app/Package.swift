// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "TrainingStep",
    platforms: [.iOS(.v17), .macOS(.v14)],
    products: [
        .library(name: "TrainingStep", targets: ["TrainingStep"]),
        .executable(name: "DigitTrainer", targets: ["DigitTrainer"]),
    ],
    targets: [
        .target(name: "TrainingStep", resources: [.copy("Resources")]),
        .executableTarget(name: "DigitTrainer", dependencies: ["TrainingStep"]),
        .testTarget(name: "TrainingStepTests", dependencies: ["TrainingStep"]),
    ]
)
