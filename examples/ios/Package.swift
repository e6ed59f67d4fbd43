// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "ChatModel",
    platforms: [.iOS(.v16), .macOS(.v13)],
    products: [.library(name: "ChatModel", targets: ["ChatModel"])],
    dependencies: [
        .package(url: "https://github.com/google-ai-edge/LiteRT-LM", from: "0.12.0")
    ],
    targets: [
        .target(
            name: "ChatModel",
            dependencies: [.product(name: "LiteRTLM", package: "LiteRT-LM")],
            path: ".",
            sources: ["ChatModel.swift"]
        )
    ]
)
