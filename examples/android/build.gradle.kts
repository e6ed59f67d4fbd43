// What an app adds to its module's build file. LiteRT-LM 0.17 and newer need a Kotlin plugin of 2.4 or newer.
dependencies {
    implementation("com.google.ai.edge.litertlm:litertlm-android:latest.release")
    implementation("org.jetbrains.kotlinx:kotlinx-coroutines-android:1.10.2")
}
