// writer.h: the result is written whole or not at all.
//
// Everything is written into the directory DST.saving, flushed, and renamed to DST at the end. What a killed run left
// behind there is removed by the next; the system drops the lock on it when a run ends, however it ends.
#pragma once
#include <sys/statvfs.h>
#include <sys/syscall.h>

static char saving_path[PATH_SIZE]; // empty: there is nothing to remove
static int saving_lock = -1;

static void remove_saving(void) {
    Error ignored = {""};
    if (!saving_path[0]) return;
    move_files(saving_path, NULL, &ignored);
    rmdir(saving_path);
    saving_path[0] = 0;
    if (saving_lock >= 0) close(saving_lock);
    saving_lock = -1;
}

static struct {
    long done, total; // bytes
    long overflows; // numbers that the format could not hold
    double started, shown;
} progress;

static void progress_add(long bytes) {
    progress.done += bytes;
    heed_signals();
    double now = seconds();
    if (!isatty(2) || now - progress.shown < 0.2) return;
    progress.shown = now;
    char bar[31];
    double share = progress.total ? (double)progress.done / (double)progress.total : 1,
           rate = (double)progress.done / (now - progress.started + 1e-9);
    for (int i = 0; i < 30; i++) bar[i] = i < share * 30 ? '#' : '.';
    bar[30] = 0;
    Field line[] = {field(4, "%s", bar), field(0, "%3.0f %%", 100 * share),
                    field(2, "%.2f of %.2f GB", progress.done * 1e-9, progress.total * 1e-9),
                    field(3, "%.0f MB/s", rate * 1e-6),
                    field_time_left(1, (double)(progress.total - progress.done) / (rate + 1e-9))};
    show_progress(line, 5);
}

static void write_all(int fd, const char* path, const void* data, size_t n) {
    for (size_t done = 0; done < n;) {
        ssize_t put = write(fd, (const char*)data + done, n - done);
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) die(1, "%s: %s; nothing was made", path, put < 0 ? strerror(errno) : "the disk takes no more");
        done += (size_t)put;
    }
}

// Asks the system to begin with the disk's work, so that the flush at the end does not wait for all of it.
static void start_flushing(int fd, long from, long to) {
#ifdef SYNC_FILE_RANGE_WRITE
    if (to > from) sync_file_range(fd, from, to - from, SYNC_FILE_RANGE_WRITE);
#else
    (void)fd, (void)from, (void)to;
#endif
}

// The format of a tensor of the result.
static Dtype output_dtype(const Plan* p, const Role* r, const char* name) {
    const Source* s = p->sources[0];
    if (r->kind == ROUTER_CORRECTION) return DTYPE_F32;
    if (is(ask.dtype, "f32")) return DTYPE_F32;
    if (is(ask.dtype, "bf16")) return DTYPE_BF16;
    if (r->kind == ROUTER_ROWS && !p->dense) return s->views[s->router[r->layer]].stored->dtype;
    if (r->kind == ROUTER_ROWS || (r->kind == SHARED && p->dense))
        return source_ffn(s, r->layer, 0, GATE)->stored->dtype;
    if (r->kind == FFN_MATRIX && p->config.sparse[r->layer]) {
        int e = plan_source(p, r->layer, r->expert);
        const Source* made_from = p->dense && e >= 0 ? p->sources[e] : s;
        return source_ffn(made_from, r->layer, p->dense || e < 0 ? 0 : e, r->matrix)->stored->dtype;
    }
    const View* v = source_find(s, name);
    return v ? v->stored->dtype : DTYPE_F32;
}

// Lists the tensors of DST and packs them into files of at most `most` bytes of data (one tensor may be larger).
static void plan_outputs(Plan* p, long most) {
    static const char* endings[] = {"", ".exp_avg", ".exp_avg_sq"};
    p->layout = layout_create(&p->config);
    p->outputs = NEW(Output, 3 * p->layout.count);
    long at = 0;
    int file = 0;
    for (int holds = WEIGHTS; holds <= (p->carries ? EXP_AVG_SQ : WEIGHTS); holds++) {
        if (holds == EXP_AVG) {
            file++;
            at = 0;
        }
        for (int i = 0; i < p->layout.count; i++) {
            Output* o = &p->outputs[p->num_outputs];
            o->tensor = &p->layout.tensors[i];
            o->role = role_of(o->tensor->name);
            o->holds = holds;
            o->dtype = holds == WEIGHTS ? output_dtype(p, &o->role, o->tensor->name) : DTYPE_F32;
            if (o->dtype == DTYPE_F64) o->dtype = DTYPE_F32;
            if (holds != WEIGHTS && o->role.kind == ROUTER_CORRECTION) {
                const Source* s = p->states[holds];
                if (s->correction[o->role.layer] < 0 || !s->views[s->correction[o->role.layer]].stored) continue;
            }
            snprintf(o->name, sizeof o->name, "%s%s", o->tensor->name, endings[holds]);
            o->bytes = tensor_size(o->tensor) * dtype_size(o->dtype);
            if (holds == WEIGHTS && at > 0 && at + o->bytes > most) {
                file++;
                at = 0;
            }
            o->file = file;
            o->offset = at;
            at += o->bytes;
            progress.total += o->bytes;
            p->num_outputs++;
        }
        if (holds == WEIGHTS) p->model_files = file + 1;
    }
    p->num_files = file + 1;
}

// The shared expert that a dense SRC has not. Its down is 0: it adds exactly nothing. The rest is N(0, 0.02), so that
// it can learn, and because llama.cpp computes its gate as silu(z) / z, which is no number for a gate of zeros. Where
// the shared expert is made of SRC's units its gate is so small that sigmoid(z) is 1/2 in fp32.
static void shared_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    t->std = t->holds == WEIGHTS && !ends_with(t->output->tensor->name, "down_proj.weight") ? 0.02 : 0;
    if (p->num_shared && t->std > 0) t->std = 1e-12;
    draw_rows(t, row, rows, out, 0, 1);
}

// How a tensor of the result is made: experts by the method, what belongs to no expert by a copy or a mean.
static Target target_open(const Plan* p, const Output* o) {
    const Role* r = &o->role;
    const Source* from = p->states[o->holds];
    int l = r->layer, E = p->sources[0]->config.num_experts, moments = o->holds != WEIGHTS;
    Target t;
    memset(&t, 0, sizeof t);
    t.output = o;
    t.layer = l;
    t.expert = r->expert;
    t.matrix = r->matrix;
    t.holds = o->holds;
    t.rows = o->tensor->rows;
    t.cols = tensor_is_matrix(o->tensor) ? o->tensor->cols : 1;
    t.by_column = r->matrix == DOWN;
    t.units = t.by_column ? t.cols : t.rows;
    t.factor = t.divisor = 1;
    if (r->kind == FFN_MATRIX && p->config.sparse[l]) {
        int e = plan_source(p, l, t.expert), copy = plan_copy(p, l, t.expert);
        t.key = stream_key(p, "weights", l, t.expert, t.matrix);
        int original = !p->dense && copy == 0 && !p->group;
        t.make = original ? source_rows : moments && e >= 0 ? p->method->carry : p->method->make;
        if (e < 0) return t; // new
        if (p->dense && !moments) from = p->sources[e];
        t.from = *source_ffn(from, l, p->dense ? 0 : e, t.matrix);
        t.next = *source_ffn(from, l, p->dense ? 0 : (e + 1) % E, t.matrix);
        if (moments) carry_expert(p, &t, e, copy);
        long H = p->config.hidden_size, I = p->config.moe_intermediate_size;
        if (p->input_norms && !moments)
            t.input_norm = p->input_norms + ((long)l * p->E + e) * (H + I) + (t.by_column ? H : 0);
    } else if (r->kind == ROUTER_ROWS || r->kind == ROUTER_CORRECTION) {
        const int* place = r->kind == ROUTER_ROWS ? from->router : from->correction;
        t.make = r->kind == ROUTER_ROWS ? router_rows : correction_rows;
        if (!p->dense) t.from = from->views[place[l]];
    } else if (r->kind == SHARED && p->num_shared && r->matrix >= 0) {
        t.expert = p->M;
        t.make = moments ? p->method->carry : p->method->make;
        t.from = *source_ffn(from, l, 0, r->matrix);
    } else if (r->kind == SHARED && p->dense) {
        t.make = shared_rows;
        t.key = random_key(stream_key(p, "shared", l, 0, 0), hash_string(o->tensor->name), 0, 0);
    } else {
        const View* v = source_find(from, o->tensor->name);
        if (!v || v->rows != t.rows || v->cols != t.cols)
            die(1, "%s: SRC has no such tensor of this shape", o->tensor->name);
        t.make = p->rest_is_mean ? average_rows : source_rows;
        t.from = *v;
    }
    return t;
}

static void target_rows(const Plan* p, Target* t, long row, long rows, float* out) {
    t->make(p, t, row, rows, out);
    double factor = t->factor / t->divisor;
    #pragma omp parallel for simd schedule(static) if (factor != 1)
    for (long i = 0; i < (factor != 1 ? rows * t->cols : 0); i++) out[i] = (float)(out[i] * factor);
    if (t->input_norm) prune_rows(t, rows, out);
}

static void target_close(Target* t) {
    free(t->marked);
    free(t->order);
    free(t->whole);
}

typedef struct {
    float* floats; // (capacity), or one row if that is longer
    unsigned char* bytes; // room for the same in any format
    long capacity; // floats
} Buffers;

// Streams one tensor to the end of a file.
static void write_output(const Plan* p, const Output* o, int fd, const char* path, Buffers* b) {
    Target t = target_open(p, o);
    const View* from = &t.from;
    int size = dtype_size(o->dtype);
    if (t.make == source_rows && t.mix == 0 && t.divisor == 1 && !t.input_norm && !from->stored_rows &&
        from->stored->dtype == o->dtype) {
        long at = from->stored->offset + from->first * size; // bit for bit
        for (long done = 0, n; done < o->bytes; done += n) {
            n = lmin(b->capacity * 4, o->bytes - done);
            if (!read_at(from->files->fds[from->stored->file], b->bytes, (size_t)n, at + done))
                die(1, "%s: tensor %s cannot be read", from->files->paths[from->stored->file], from->stored->name);
            write_all(fd, path, b->bytes, (size_t)n);
            progress_add(n);
        }
    } else {
        long wide = from->stored && from->cols > t.cols ? from->cols : t.cols, piece = wide ? b->capacity / wide : 1;
        for (long r = 0, n; r < t.rows; r += n) {
            n = lmin(piece > 1 ? piece : 1, t.rows - r);
            target_rows(p, &t, r, n, b->floats);
            progress.overflows += floats_to_bytes(b->bytes, b->floats, n * t.cols, o->dtype);
            write_all(fd, path, b->bytes, (size_t)(n * t.cols * size));
            progress_add(n * t.cols * size);
        }
    }
    target_close(&t);
}

static void output_file_name(const Plan* p, int file, char* name, size_t size) {
    if (file >= p->model_files)
        snprintf(name, size, OPTIMIZER_FILE);
    else if (p->model_files == 1)
        snprintf(name, size, "model.safetensors");
    else
        snprintf(name, size, "model-%05d-of-%05d.safetensors", file + 1, p->model_files);
}

static void output_header(const Plan* p, int file, Text* header) {
    text_print(header, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int i = 0; i < p->num_outputs; i++) {
        const Output* o = &p->outputs[i];
        if (o->file != file) continue;
        text_print(header, ",");
        text_json_string(header, o->name);
        text_print(header, ":{\"dtype\":\"%s\",\"shape\":[%ld", dtype_names[o->dtype], o->tensor->rows);
        if (tensor_is_matrix(o->tensor)) text_print(header, ",%ld", o->tensor->cols);
        text_print(header, "],\"data_offsets\":[%ld,%ld]}", o->offset, o->offset + o->bytes);
    }
    text_print(header, "}");
    while (header->length % 8) text_print(header, " ");
}

static void write_tensors(const Plan* p, const char* dir) {
    Buffers b;
    b.capacity = CHUNK_FLOATS;
    for (int i = 0; i < p->num_outputs; i++)
        if (p->outputs[i].tensor->cols * p->shards > b.capacity) b.capacity = p->outputs[i].tensor->cols * p->shards;
    b.floats = floats(b.capacity);
    b.bytes = (unsigned char*)checked_malloc(4 * (size_t)b.capacity);
    progress.started = seconds();
    progress.shown = progress.started - 1;
    for (int file = 0; file < p->num_files; file++) {
        char path[PATH_SIZE], name[64];
        unsigned char prefix[8];
        Text header = {NULL, 0, 0};
        long flushed = 0, written;
        output_file_name(p, file, name, sizeof name);
        if (file >= p->model_files && mkdir(join_path(path, dir, "trainer"), 0777))
            die(1, "%s: %s", path, strerror(errno));
        join_path(path, dir, name);
        int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0666);
        if (fd < 0) die(1, "%s: %s", path, strerror(errno));
        output_header(p, file, &header);
        for (int i = 0; i < 8; i++) prefix[i] = (unsigned char)((uint64_t)header.length >> (8 * i));
        write_all(fd, path, prefix, 8);
        write_all(fd, path, header.data, header.length);
        written = 8 + (long)header.length;
        free(header.data);
        for (int i = 0; i < p->num_outputs; i++) {
            if (p->outputs[i].file != file) continue;
            write_output(p, &p->outputs[i], fd, path, &b);
            written += p->outputs[i].bytes;
            if (written - flushed < 32 << 20) continue;
            start_flushing(fd, flushed, written);
            flushed = written;
        }
        if (flush_to_disk(fd) || close(fd)) die(1, "%s: %s; nothing was made", path, strerror(errno));
    }
    Error error = {""};
    char folder[PATH_SIZE];
    if (p->num_files > p->model_files && !flush_directory(join_path(folder, dir, "trainer"), &error))
        die(1, "%s", error.text);
    clear_progress();
    free(b.floats);
    free(b.bytes);
}

// model.safetensors.index.json, for a model in several files
static void write_index(const Plan* p, const char* dir) {
    char name[64];
    Text t = {NULL, 0, 0};
    long total = 0;
    for (int i = 0; i < p->num_outputs; i++) total += p->outputs[i].holds == WEIGHTS ? p->outputs[i].bytes : 0;
    text_print(&t, "{\n  \"metadata\": {\"total_size\": %ld},\n  \"weight_map\": {", total);
    for (int i = 0, listed = 0; i < p->num_outputs; i++) {
        if (p->outputs[i].holds != WEIGHTS) continue;
        output_file_name(p, p->outputs[i].file, name, sizeof name);
        text_print(&t, "%s\n    ", listed++ ? "," : "");
        text_json_string(&t, p->outputs[i].name);
        text_print(&t, ": \"%s\"", name);
    }
    text_print(&t, "\n  }\n}\n");
    save_text(dir, "model.safetensors.index.json", &t);
}

// config.json of the result. It names the format of most of its numbers.
static void write_config(const Plan* p, const char* dir) {
    Text t = {NULL, 0, 0};
    long bytes[3] = {0, 0, 0};
    for (int i = 0; i < p->num_outputs; i++)
        if (p->outputs[i].holds == WEIGHTS) bytes[p->outputs[i].dtype] += p->outputs[i].bytes;
    int most = bytes[1] > bytes[0] && bytes[1] >= bytes[2] ? 1 : bytes[2] > bytes[0] ? 2 : 0;
    config_to_json(&t, &p->config, p->luggage, torch_names[most]);
    save_text(dir, "config.json", &t);
}

static int replaced_lock = -1; // on the directory that --force replaces: it keeps runs of train_moe out

// What other programs and readers want beside the model. A card that somebody wrote in what --force replaces stays.
static void write_cards(const Plan* p, const char* dst, const char* dir) {
    Error error = {""};
    char from[PATH_SIZE], to[PATH_SIZE], *old = replaced_lock >= 0 ? read_card(dst) : NULL;
    const Source* s = p->sources[0];
    int bytes = reads_bytes(&s->config, s->dir) == BYTES;
    int taken_over = replaced_lock >= 0 && holds(dst, "README.md") && !card_is_ours(old);
    join_path(from, dst, "README.md");
    free(old);
    if (!carry_card(s->dir, dir, &error) || (bytes && !has_tokenizer(dir) && !write_byte_tokenizer(dir, dir, &error)) ||
        !(taken_over ? copy_file_to(from, join_path(to, dir, "README.md"), &error)
                     : write_readme(&p->config, bytes, s->dir, dst, dir, dir, &error)))
        die(1, "%s", error.text);
}

// 1 if one of two directories is the other or holds it; both are as realpath gives them
static int paths_overlap(const char* a, const char* b) {
    size_t n = strlen(a), k = strlen(b), shorter = n < k ? n : k;
    return !strncmp(a, b, shorter) && (n == k || a[shorter] == '/' || b[shorter] == '/');
}

#define SAVING_MARKER ".upcycle"
static int belongs_to_checkpoint(const char* name) {
    static const char* endings[] = {".safetensors", ".json", ".csv", ".lock"};
    size_t n = strlen(name);
    int known = 0;
    for (int i = 0; i < 4; i++) {
        size_t k = strlen(endings[i]);
        known |= n > k && !strcmp(name + n - k, endings[i]);
    }
    static const char* others[] = {"README.md", "README.source.md", ".gitattributes"};
    for (int i = 0; i < 3; i++) known |= !strcmp(name, others[i]);
    return known || travels(name) || !strcmp(name, SAVING_MARKER);
}

// 1 if a directory holds nothing but a file of moments; that is what --force may find under the name trainer.
static int holds_moments_only(const char* path) {
    DIR* d = opendir(path);
    struct dirent* entry;
    int only = d != NULL;
    while (d && (entry = readdir(d)) != NULL)
        only &= !strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..") ||
                !strcmp(entry->d_name, strchr(OPTIMIZER_FILE, '/') + 1);
    if (d) closedir(d);
    return only;
}

// DST without slashes at its end; it must not exist, or hold a checkpoint and --force be given. The source is never
// touched.
static void check_destination(const char* dst, char* clean, Source** sources, int num_sources) {
    char saving[PATH_SIZE], real_saving[PATH_SIZE] = "";
    char parent[PATH_SIZE], real_parent[PATH_SIZE], real[PATH_SIZE], path[PATH_SIZE];
    size_t n = strlen(dst);
    struct stat st;
    while (n > 1 && dst[n - 1] == '/') n--;
    if (n + 16 > PATH_SIZE) die(2, "the path %.60s... is too long", dst);
    memcpy(clean, dst, n);
    clean[n] = 0;
    const char *slash = strrchr(clean, '/'), *base = slash ? slash + 1 : clean;
    if (!*base || !strcmp(base, ".") || !strcmp(base, "..")) die(2, "%s: expected the name of a new directory", dst);
    snprintf(parent, sizeof parent, "%.*s", slash == clean ? 1 : slash ? (int)(slash - clean) : 1, slash ? clean : ".");
    if (!realpath(parent, real_parent)) die(2, "%s: %s; DST's parent directory must exist", parent, strerror(errno));
    if (access(real_parent, W_OK)) die(2, "%s: %s", parent, strerror(errno));
    join_path(path, strcmp(real_parent, "/") ? real_parent : "", base);
    int exists = !lstat(clean, &st);
    if (exists && !realpath(clean, path)) die(2, "%s: %s", dst, strerror(errno));
    // DST is written in DST.saving, which may be left from a run that was killed, but must be nothing else
    snprintf(saving, sizeof saving, "%.4000s.saving", clean);
    int stale = !lstat(saving, &st);
    if (stale && (!S_ISDIR(st.st_mode) || !realpath(saving, real_saving)))
        die(2, "%s is in the way and is not a directory; remove it, or choose another DST", saving);
    for (int i = 0; i < num_sources + (ask.reference != NULL); i++) {
        const char* source = i < num_sources ? sources[i]->dir : ask.reference;
        if (!realpath(source, real)) die(2, "%s: %s", source, strerror(errno));
        if (paths_overlap(path, real))
            die(2, "%s: DST must lie outside of the source %s, which is never changed", dst, source);
        if (stale && paths_overlap(real_saving, real))
            die(2, "%s is the source %s, but DST is written there first; choose another DST", saving, source);
    }
    if (exists) exists = !lstat(clean, &st);
    if (!exists) return;
    if (!ask.force) die(2, "%s exists; choose another DST, or --force replaces it", dst);
    if (!S_ISDIR(st.st_mode)) die(2, "%s is not a directory; --force replaces checkpoints only", dst);
    if (replaced_lock < 0) {
        replaced_lock = open(clean, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
        if (replaced_lock < 0) die(2, "%s: %s", dst, strerror(errno));
        if (!lock_directory(replaced_lock, dst)) die(2, "%s: a run is writing there; stop it first", dst);
    }
    DIR* d = opendir(clean);
    struct dirent* entry;
    int files = 0, config = 0;
    while (d && (entry = readdir(d)) != NULL) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        if (!strcmp(entry->d_name, templates_dir)) continue;
        join_path(path, clean, entry->d_name);
        int directory = !lstat(path, &st) && S_ISDIR(st.st_mode);
        if (directory && (strcmp(entry->d_name, "trainer") || !holds_moments_only(path)))
            die(2, "%s holds the directory %s; --force replaces plain checkpoints only", dst, entry->d_name);
        if (!directory && !belongs_to_checkpoint(entry->d_name))
            die(2, "%s holds %s, which is no part of a checkpoint; --force replaces checkpoints only", dst,
                entry->d_name);
        files++;
        config |= !strcmp(entry->d_name, "config.json");
    }
    if (d) closedir(d);
    if (files && !config) die(2, "%s holds no config.json; --force replaces checkpoints only", dst);
}

static void begin_saving(const char* dst) {
    char path[PATH_SIZE], marker[PATH_SIZE];
    Error error = {""};
    static int registered = 0;
    snprintf(path, sizeof path, "%.4000s.saving", dst);
    int made = !mkdir(path, 0777);
    if (!made && errno != EEXIST) die(2, "%s: %s", path, strerror(errno));
    // a marker tells what a killed run has left from a directory that somebody else has made (an empty one is no harm)
    join_path(marker, path, SAVING_MARKER);
    if (!made && access(marker, F_OK) && (rmdir(path) || mkdir(path, 0777)))
        die(2, "%s is in the way and was not made by upcycle; remove it, or choose another DST", path);
    saving_lock = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (saving_lock < 0) die(1, "%s: %s", path, strerror(errno));
    if (!lock_directory(saving_lock, path)) die(2, "%s: another run is writing there", path);
    move_files(path, NULL, &error);
    if (error.text[0] || !write_file(marker, "", 0, &error)) die(1, "%s", error.text);
    strcpy(saving_path, path);
    if (!registered) atexit(remove_saving);
    registered = 1;
}

#ifndef RENAME_NOREPLACE
#define RENAME_NOREPLACE 1
#endif
#ifndef RENAME_EXCHANGE
#define RENAME_EXCHANGE 2
#endif
static int rename_flags(const char* from, const char* to, unsigned flags) {
#ifdef SYS_renameat2
    if (!syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, flags)) return 0;
    if (errno != ENOSYS && errno != EINVAL) return -1;
#endif
    if (flags == RENAME_NOREPLACE) return rename(from, to);
    char old[PATH_SIZE]; // without an exchange: two steps; the old one is whole at every moment
    snprintf(old, sizeof old, "%.4000s.old", to);
    if (rename(to, old)) return -1;
    if (rename(from, to)) {
        int reason = errno;
        rename(old, to);
        errno = reason;
        return -1;
    }
    return rename(old, from);
}

// The moment from which DST is there.
static void finish_saving(const char* dst) {
    Error error = {""};
    char parent[PATH_SIZE];
    const char* slash = strrchr(dst, '/');
    snprintf(parent, sizeof parent, "%.*s", slash == dst ? 1 : slash ? (int)(slash - dst) : 1, slash ? dst : ".");
    char marker[PATH_SIZE];
    if (!flush_directory(saving_path, &error)) die(1, "%s", error.text);
    heed_signals();
    // what has come to DST since it was looked at and locked is not replaced
    struct stat now, then;
    int replace = replaced_lock >= 0 && !stat(dst, &now) && !fstat(replaced_lock, &then) && now.st_ino == then.st_ino;
    // Both have the marker for a moment: what is killed here leaves DST.saving as what upcycle may remove.
    join_path(marker, dst, SAVING_MARKER);
    if (replace && !write_file(marker, "", 0, &error)) die(1, "%s", error.text);
    if (rename_flags(saving_path, dst, replace ? RENAME_EXCHANGE : RENAME_NOREPLACE)) {
        int reason = errno;
        if (replace) unlink(marker);
        die(1, "%s: %s", dst, strerror(reason));
    }
    unlink(marker);
    if (replace) remove_saving(); // now holds what was replaced
    saving_path[0] = 0;
    if (saving_lock >= 0) close(saving_lock);
    saving_lock = -1;
    if (!flush_directory(dst, &error) || !flush_directory(parent, &error)) die(1, "%s", error.text);
}
