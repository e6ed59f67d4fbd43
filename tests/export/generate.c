/* Continues a prompt with an exported folder through TensorFlow's C API: no Python in the loop.

   generate FOLDER SIGNATURE INPUT OUTPUT TEXT [LIBRARY...]

   Feeds TEXT as the string tensor [1] INPUT of SIGNATURE and prints the string of OUTPUT. Libraries of ops
   that are not TensorFlow's own, such as tensorflow-text's, are loaded first. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"
#include "tensorflow/c/tf_tstring.h"

static void fail(const char* what, const char* why) {
  fprintf(stderr, "%s: %s\n", what, why);
  exit(1);
}

static void check(TF_Status* status, const char* what) {
  if (TF_GetCode(status) != TF_OK) fail(what, TF_Message(status));
}

/* A stretch of a serialized protocol buffer. */
typedef struct {
  const unsigned char* data;
  size_t size;
} Bytes;

static size_t read_varint(Bytes* rest) {
  size_t value = 0;
  int shift = 0;
  while (rest->size > 0 && shift < 64) {
    unsigned char byte = *rest->data++;
    rest->size--;
    value |= (size_t)(byte & 127) << shift;
    if (byte < 128) return value;
    shift += 7;
  }
  fail("MetaGraphDef", "damaged number");
  return 0;
}

/* Takes the next field of a message; those that are no stretch of bytes have none. */
static size_t read_field(Bytes* rest, Bytes* content) {
  size_t key = read_varint(rest), length = 0;
  content->data = NULL;
  content->size = 0;
  switch (key & 7) {
    case 0: read_varint(rest); return key >> 3;
    case 1: length = 8; break;
    case 2: length = read_varint(rest); break;
    case 5: length = 4; break;
    default: fail("MetaGraphDef", "unknown kind of field");
  }
  if (length > rest->size) fail("MetaGraphDef", "it ends too early");
  content->data = rest->data;
  content->size = length;
  rest->data += length;
  rest->size -= length;
  return key >> 3;
}

static Bytes find_field(Bytes message, size_t number) {
  Bytes content = {NULL, 0};
  while (message.size > 0)
    if (read_field(&message, &content) == number) return content;
  content.data = NULL;
  content.size = 0;
  return content;
}

/* The value of a key in field `number`, a map whose entries are messages of key (1) and value (2). */
static Bytes find_entry(Bytes message, size_t number, const char* wanted) {
  while (message.size > 0) {
    Bytes entry;
    if (read_field(&message, &entry) != number) continue;
    Bytes key = find_field(entry, 1);
    if (key.size == strlen(wanted) && memcmp(key.data, wanted, key.size) == 0) return find_field(entry, 2);
  }
  fail("the folder has no", wanted);
  return message;
}

/* From a TensorInfo, whose name is like "operation:0", to the output of the operation. */
static TF_Output find_output(TF_Graph* graph, Bytes info) {
  Bytes text = find_field(info, 1);
  char* name = calloc(text.size + 1, 1);
  memcpy(name, text.data, text.size);
  char* colon = strrchr(name, ':');
  if (colon == NULL) fail("no output of an operation", name);
  *colon = 0;
  TF_Output output = {TF_GraphOperationByName(graph, name), atoi(colon + 1)};
  if (output.oper == NULL) fail("the graph has no operation", name);
  free(name);
  return output;
}

int main(int count, char** arguments) {
  if (count < 6) fail("usage", "generate FOLDER SIGNATURE INPUT OUTPUT TEXT [LIBRARY...]");
  TF_Status* status = TF_NewStatus();
  for (int i = 6; i < count; i++) {
    TF_LoadLibrary(arguments[i], status);
    check(status, arguments[i]);
  }
  TF_Graph* graph = TF_NewGraph();
  TF_SessionOptions* options = TF_NewSessionOptions();
  TF_Buffer* meta_graph = TF_NewBuffer();
  const char* tags[] = {"serve"};
  TF_Session* session =
      TF_LoadSessionFromSavedModel(options, NULL, arguments[1], tags, 1, graph, meta_graph, status);
  check(status, arguments[1]);

  /* MetaGraphDef.signature_def, SignatureDef.inputs and .outputs */
  Bytes whole = {meta_graph->data, meta_graph->length};
  Bytes signature = find_entry(whole, 5, arguments[2]);
  TF_Output input = find_output(graph, find_entry(signature, 1, arguments[3]));
  TF_Output output = find_output(graph, find_entry(signature, 2, arguments[4]));

  int64_t rows = 1;
  TF_Tensor* fed = TF_AllocateTensor(TF_STRING, &rows, 1, sizeof(TF_TString));
  TF_TString* text = TF_TensorData(fed);
  TF_StringInit(text);
  TF_StringCopy(text, arguments[5], strlen(arguments[5]));
  TF_Tensor* fetched = NULL;
  TF_SessionRun(session, NULL, &input, &fed, 1, &output, &fetched, 1, NULL, 0, NULL, status);
  check(status, arguments[2]);

  if (TF_TensorType(fetched) != TF_STRING || TF_NumDims(fetched) != 1 || TF_Dim(fetched, 0) != 1)
    fail(arguments[4], "not one string");
  TF_TString* result = TF_TensorData(fetched);
  fwrite(TF_StringGetDataPointer(result), 1, TF_StringGetSize(result), stdout);

  TF_DeleteTensor(fetched);
  TF_DeleteTensor(fed);
  TF_CloseSession(session, status);
  TF_DeleteSession(session, status);
  TF_DeleteBuffer(meta_graph);
  TF_DeleteSessionOptions(options);
  TF_DeleteGraph(graph);
  TF_DeleteStatus(status);
  return 0;
}
