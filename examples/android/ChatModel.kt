import com.google.ai.edge.litertlm.Backend
import com.google.ai.edge.litertlm.Conversation
import com.google.ai.edge.litertlm.Engine
import com.google.ai.edge.litertlm.EngineConfig
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flowOn
import kotlinx.coroutines.flow.map
import kotlinx.coroutines.withContext

/** A conversation with an exported model; close it when the screen goes. */
class ChatModel private constructor(
    private val engine: Engine,
    private val conversation: Conversation,
) : AutoCloseable {

    /** The answer to a message, piece by piece. */
    fun answer(message: String): Flow<String> =
        conversation.sendMessageAsync(message).map { it.toString() }.flowOn(Dispatchers.Default)

    override fun close() {
        conversation.close()
        engine.close()
    }

    companion object {
        /** Loads a `.litertlm`, which takes seconds; in `cacheDir` the runtime keeps what makes the next time quicker. */
        suspend fun load(modelPath: String, cacheDir: String): ChatModel =
            withContext(Dispatchers.Default) {
                val engine = Engine(
                    EngineConfig(modelPath = modelPath, backend = Backend.CPU(), cacheDir = cacheDir)
                )
                engine.initialize()
                ChatModel(engine, engine.createConversation())
            }
    }
}
