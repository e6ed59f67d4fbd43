import Foundation
import LiteRTLM

/// A conversation with an exported model.
public actor ChatModel {
    private let engine: Engine
    private let conversation: Conversation

    /// Loads a `.litertlm`, which takes seconds.
    public init(modelPath: String) async throws {
        let config = try EngineConfig(
            modelPath: modelPath,
            backend: .cpu(),
            cacheDir: NSTemporaryDirectory()
        )
        engine = Engine(engineConfig: config)
        try await engine.initialize()
        conversation = try await engine.createConversation()
    }

    /// Answers a message; `show` gets the answer piece by piece.
    public func answer(_ message: String, show: (String) -> Void) async throws {
        for try await piece in conversation.sendMessageStream(Message(message)) {
            show(piece.toString)
        }
    }
}
