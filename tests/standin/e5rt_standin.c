/* A dispatch library with the C interface that ANEForge 0.4 binds, whose engine is a set of callbacks.
 *
 * Ports, buffers, sharing, life cycle and error returns live here and follow what the interface documents:
 * every port has memory of its own, at least 64 bytes and zeroed; sharing binds an input port to an output
 * port's memory and is refused after the first run; at most 128 programs are loaded at a time. What a program
 * computes, and whether it compiles, the callbacks decide.
 *
 * Build: cc -shared -fPIC -O1 -o libstandin.so e5rt_standin.c
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_LOADED 128

/* Returns an id of the compiled program (>= 0), or -1 with the reason on standard error. */
typedef int64_t (*compile_fn)(const char *mil_path, uint64_t mask,
                              const char *const *in_names, const size_t *in_bytes, size_t n_in,
                              const char *const *out_names, const size_t *out_bytes, size_t n_out);
/* Reads the inputs' memory, then writes the outputs' memory; 0 if all went well. */
typedef int (*execute_fn)(int64_t id, void *const *inputs, size_t n_in, void *const *outputs, size_t n_out);
typedef void (*release_fn)(int64_t id);

static compile_fn on_compile;
static execute_fn on_execute;
static release_fn on_release;
static int loaded;

typedef struct {
  char *name;
  void *own;   /* memory that this port allocated */
  void *data;  /* memory that it is bound to */
  size_t bytes;
} port_t;

typedef struct {
  int64_t id;
  int finalized;
  port_t *in, *out;
  size_t n_in, n_out;
} program_t;

void standin_set_handlers(compile_fn compile, execute_fn execute, release_fn release) {
  on_compile = compile;
  on_execute = execute;
  on_release = release;
}

int standin_loaded(void) { return loaded; }

static port_t *make_ports(const char *const *names, const size_t *bytes, size_t n) {
  port_t *ports = calloc(n ? n : 1, sizeof *ports);
  for (size_t i = 0; i < n; i++) {
    size_t rounded = bytes[i] < 64 ? 64 : (bytes[i] + 63) & ~(size_t)63;
    ports[i].name = strdup(names[i]);
    ports[i].own = aligned_alloc(64, rounded);
    memset(ports[i].own, 0, rounded);
    ports[i].data = ports[i].own;
    ports[i].bytes = bytes[i];
  }
  return ports;
}

static void free_ports(port_t *ports, size_t n) {
  for (size_t i = 0; i < n; i++) {
    free(ports[i].name);
    free(ports[i].own);
  }
  free(ports);
}

static port_t *find(port_t *ports, size_t n, const char *name) {
  for (size_t i = 0; i < n; i++)
    if (!strcmp(ports[i].name, name)) return &ports[i];
  fprintf(stderr, "standin: no port %s\n", name);
  return NULL;
}

program_t *ane_e5rt_program_compile(const char *mil_path, const char *cache_dir, uint64_t mask,
                                    const char *const *in_names, const size_t *in_bytes, size_t n_in,
                                    const char *const *out_names, const size_t *out_bytes, size_t n_out) {
  (void)cache_dir;
  if (!on_compile) { fprintf(stderr, "standin: no handlers\n"); return NULL; }
  if (loaded >= MAX_LOADED) { fprintf(stderr, "standin: %d programs are loaded\n", loaded); return NULL; }
  int64_t id = on_compile(mil_path, mask, in_names, in_bytes, n_in, out_names, out_bytes, n_out);
  if (id < 0) return NULL;
  program_t *program = calloc(1, sizeof *program);
  program->id = id;
  program->in = make_ports(in_names, in_bytes, program->n_in = n_in);
  program->out = make_ports(out_names, out_bytes, program->n_out = n_out);
  loaded++;
  return program;
}

int ane_e5rt_program_set_input_fp16(program_t *program, const char *name, const uint16_t *data, size_t words) {
  port_t *port = program ? find(program->in, program->n_in, name) : NULL;
  if (!port || 2 * words > port->bytes) return -1;
  memcpy(port->data, data, 2 * words);
  return 0;
}

int ane_e5rt_program_get_output_fp16(program_t *program, const char *name, uint16_t *target, size_t words) {
  port_t *port = program ? find(program->out, program->n_out, name) : NULL;
  if (!port) return -1;
  memcpy(target, port->data, 2 * words < port->bytes ? 2 * words : port->bytes);
  return 0;
}

static int expose(port_t *port, void **data, size_t *bytes) {
  if (!port) return -1;
  if (data) *data = port->data;
  if (bytes) *bytes = port->bytes;
  return 0;
}

int ane_e5rt_program_input_buffer(program_t *program, const char *name, void **data, size_t *bytes) {
  return program ? expose(find(program->in, program->n_in, name), data, bytes) : -1;
}

int ane_e5rt_program_output_buffer(program_t *program, const char *name, void **data, size_t *bytes) {
  return program ? expose(find(program->out, program->n_out, name), data, bytes) : -1;
}

int ane_e5rt_program_share_buffer(program_t *program, size_t src_op, const char *src, size_t dst_op,
                                  const char *dst) {
  if (!program || src_op || dst_op) return -1;
  if (program->finalized) { fprintf(stderr, "standin: the program has run\n"); return -1; }
  port_t *from = find(program->out, program->n_out, src), *to = find(program->in, program->n_in, dst);
  if (!from || !to) return -1;
  to->data = from->data;
  to->bytes = from->bytes;
  return 0;
}

int ane_e5rt_program_execute(program_t *program) {
  if (!program) return -1;
  program->finalized = 1;
  void *in[program->n_in + 1], *out[program->n_out + 1];
  for (size_t i = 0; i < program->n_in; i++) in[i] = program->in[i].data;
  for (size_t i = 0; i < program->n_out; i++) out[i] = program->out[i].data;
  return on_execute(program->id, in, program->n_in, out, program->n_out);
}

void ane_e5rt_program_release(program_t *program) {
  if (!program) return;
  on_release(program->id);
  free_ports(program->in, program->n_in);
  free_ports(program->out, program->n_out);
  free(program);
  loaded--;
}

int ane_e5rt_compile_check(const char *mil_path, const char *cache_dir, uint64_t mask, const char *options) {
  (void)cache_dir;
  (void)options;
  int64_t id = on_compile ? on_compile(mil_path, mask, NULL, NULL, 0, NULL, NULL, 0) : -1;
  if (id < 0) return -1;
  on_release(id);
  return 0;
}
