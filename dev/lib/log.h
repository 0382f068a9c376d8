// log.h: what a run says: progress, rows of csv files, failures. Needs train_moe.c's Run, Step and Model.
#pragma once

// Mean loss over the first `batches` batches of a data set in file order (0: all of it). NaN if a signal
// stopped it or the data cannot be read (d->error).
static double evaluate(Model* m, Dataset* d, long batches, Batch batch) {
    long windows = batches > 0 ? lmin(batches * m->B, d->windows) : d->windows;
    double sum = 0, started = seconds();
    for (long w = 0; w < windows; w += m->B) {
        int B = (int)lmin(m->B, windows - w);
        show_count("loss: window", w, windows, started);
        for (int b = 0; b < B; b++)
            if (!dataset_read(d, w + b, batch.tokens + (long)b * d->T, batch.targets + (long)b * d->T))
                return NAN;
        m->trace_window = w;
        model_forward(m, batch.tokens, batch.targets, B, d->T);
        sum += take_losses(m).loss * B;
        if (stop_signal) return NAN;
    }
    clear_progress();
    return sum / (double)windows;
}

// Opens OUT/name for appending. A run that continues at `step` first drops the rows of later steps, which it will make
// again; a new run starts with the header.
static FILE* log_open(const char* out, const char* name, const char* header, long step) {
    char path[PATH_SIZE], temporary[PATH_SIZE], line[1024];
    join_path(path, out, name);
    join_path(temporary, out, ".log");
    FILE *kept = fopen(temporary, "w"), *old = step > 0 ? fopen(path, "r") : NULL;
    if (!kept) die(1, "%s: %s", temporary, strerror(errno));
    fprintf(kept, "%s\n", header);
    if (old) {
        if (fgets(line, sizeof line, old))
            while (fgets(line, sizeof line, old))
                if (strchr(line, '\n') && atol(line) <= step) fputs(line, kept);
        fclose(old);
    }
    if (fclose(kept) || rename(temporary, path)) die(1, "%s: %s", path, strerror(errno));
    FILE* log = fopen(path, "a");
    if (!log) die(1, "%s: %s", path, strerror(errno));
    return log;
}

// Where a run's reports go, and what they need to know of it.
typedef struct {
    const Run* run;
    const char* out;                    // NULL: nothing is written
    FILE *steps, *val, *load;           // out/log.csv, val.csv, load.csv, or NULL
    long first_step, saved, tried;      // where this process began; the last checkpoint; the last try to save one
    long validated;                     // the last step that was
    double started, flops;              // flops of a token
    int incomplete;                     // rows are missing, which has been said
} Reports;

// Whether OUT/name has a row of this step.
static int log_has(const char* out, const char* name, long step) {
    char path[PATH_SIZE], line[1024];
    FILE* f = fopen(join_path(path, out, name), "r");
    int found = 0;
    while (f && fgets(line, sizeof line, f)) found |= strchr(line, '\n') && atol(line) == step;
    if (f) fclose(f);
    return found;
}

static Reports reports_open(const Model* m, const Run* run, const Dataset* val, const char* out) {
    Reports r;
    long first_step = run->begun.step;
    memset(&r, 0, sizeof r);
    r.run = run;
    r.out = out;
    r.first_step = r.saved = r.tried = first_step;
    r.started = seconds();
    r.flops = flops_per_token(&m->config, run->T);
    if (!out) return r;
    r.steps = log_open(out, "log.csv", "step,tokens,train_loss,aux_loss,z_loss,lr,grad_norm,tokens_per_s,lpr_loss",
                       first_step);
    // the row of val.csv is the last thing that a validation writes
    int known = first_step > 0 && log_has(out, val ? "val.csv" : "load.csv", first_step);
    r.validated = known ? first_step : first_step - 1;
    r.val = log_open(out, "val.csv", "step,tokens,val_loss", r.validated);
    r.load = log_open(out, "load.csv", LOAD_HEADER, r.validated);
    return r;
}

static void reports_close(Reports* r) {
    if (!r->out) return;
    fclose(r->steps);
    fclose(r->val);
    fclose(r->load);
}

// Whether something that happens every `period` steps (0: never) happens after this one.
static int is_due(long period, long done) { return period > 0 && done % period == 0; }

static Position position_at(const Reports* r, long done) {
    return position_after(r->run->begun, done, (long)r->run->B * r->run->accum, r->run->T);
}

static void reports_flush(Reports* r, long done) {
    if (!r->out || r->incomplete || (!fflush(r->steps) && !fflush(r->load) && !fflush(r->val))) return;
    int why = errno;
    end_progress();
    fprintf(stderr, "%s: warning: the logs in %s are incomplete from step %ld on: %s\n", program_name, r->out, done,
            strerror(why));
    r->incomplete = 1;
}

static void report_step(Reports* r, const Step* s, long done) {
    long steps = r->run->steps;
    double rate = (double)r->run->B * r->run->T * r->run->accum / s->seconds;
    Field line[] = {field(0, "step %ld/%ld", done, steps), field(1, "loss %.4f", s->mean.loss),
                    field(5, "lr %.2e", s->lr), field(4, "norm %.2f", s->norm), field(3, "%.0f tokens/s", rate),
                    field(6, "%.1f GFLOP/s", rate * r->flops * 1e-9),
                    field_time_left(2, (seconds() - r->started) / (done - r->first_step) * (steps - done))};
    show_progress(line, 7);
    if (r->out)
        fprintf(r->steps, "%ld,%ld,%.6f,%.6f,%.6f,%.6e,%.6f,%.1f,%.6f\n", done, position_at(r, done).tokens,
                s->mean.loss, s->mean.aux, s->mean.z, s->lr, s->norm, rate, s->mean.lpr);
    reports_flush(r, done);             // a step that is saved has its row
}

static void report_validation(Reports* r, const Dataset* val, double loss, long done) {
    printf("step %ld: validation loss %.4f", done, loss);
    if (val->raw) printf(" nats (%.4f bits) a byte", loss / M_LN2);
    printf("\n");
    if (r->out) fprintf(r->val, "%ld,%ld,%.6f\n", done, position_at(r, done).tokens, loss);
}

// The experts' load since the last report.
static void report_experts(Reports* r, Model* m, long done) {
    if (m->has_families) m->backend->read_back(m, PARAMETERS);         // their similarity is reported
    if (m->config.num_experts > 0) report_load(m, 0, r->load, done);
    fflush(stdout);
    clear_load(m);
}

// Validates the model of step `done`, unless a signal comes. Returns NULL, or why the data cannot be read.
static const char* validate(Reports* r, Model* m, Dataset* val, Batch batch, long done) {
    double loss = val ? evaluate(m, val, r->run->val_batches, batch) : 0;
    if (val && val->error[0]) return val->error;
    if (stop_signal) return NULL;
    end_progress();
    if (val) report_validation(r, val, loss, done);
    report_experts(r, m, done);
    reports_flush(r, done);
    r->validated = done;
    return NULL;
}

// The checkpoint that a run goes on from was saved before its validation, which may have been made or not.
static const char* resume_validation(Reports* r, Model* m, Dataset* val, Batch batch) {
    const char* problem = NULL;
    long step = r->first_step;
    if (step > 0 && r->validated == step) clear_load(m);
    else if (step > 0 && (step == r->run->steps || is_due(r->run->val_every, step)))
        problem = validate(r, m, val, batch, step);
    return problem;
}

// Saves step `done`. If that fails, the run goes on and tries again with the next save.
static void save_step(Reports* r, Model* m, long done) {
    m->backend->read_back(m, PARAMETERS | MOMENTS);
    const char* error = checkpoint_save(m, r->out, done);
    r->tried = done;
    if (!error) {
        r->saved = done;
        return;
    }
    end_progress();
    fprintf(stderr, "%s: step %ld could not be saved: %s; ", program_name, done, error);
    if (r->saved > 0) fprintf(stderr, "the checkpoint of step %ld in %s is intact\n", r->saved, r->out);
    else fprintf(stderr, "%s holds no checkpoint\n", r->out);
}

// Why the run stops after step `done`: in the next step (next = 1), or in its own validation. The model of that step is
// kept, unless its last loss shows that it is ruined: not finite, or more than guessing has. Returns the exit code.
static int report_problem(Reports* r, Model* m, const Step* s, long done, int next) {
    int sound = !*s->advice || s->mean.loss < log(m->config.vocab_size);
    if (r->out && r->tried < done && sound) save_step(r, m, done);
    end_progress();
    fprintf(stderr, "%s: step %ld: %s; ", program_name, done + next, s->problem);
    if (r->out && r->saved > 0)
        fprintf(stderr, "the checkpoint of step %ld in %s is intact%s\n", r->saved, r->out, s->advice);
    else fprintf(stderr, "nothing had been saved%s\n", s->advice);
    return 1;
}

// No step is left: a run of no steps saves the model as it starts. Returns the exit code.
static int nothing_to_do(const Reports* r, const Model* m) {
    const char* error = NULL;
    if (!r->out || r->run->steps > 0 || r->first_step > 0)
        printf("nothing left to do: step %ld of %ld is reached\n", r->first_step, r->run->steps);
    else if ((error = checkpoint_save(m, r->out, 0)) != NULL)
        fprintf(stderr, "%s: the model could not be saved: %s\n", program_name, error);
    else printf("no steps: the model is saved in %s as it starts\n", r->out);
    return error != NULL;
}

// A signal has ended the run; returns the exit code.
static int report_signal(const Reports* r) {
    if (r->out && r->saved > 0)
        fprintf(stderr, "%s: stopped by a signal; step %ld is saved in %s, --resume goes on\n", program_name, r->saved,
                r->out);
    else
        fprintf(stderr, "%s: stopped by a signal; nothing was saved, as there was no %s\n", program_name,
                r->out ? "step to save" : "--out");
    return 128 + stop_signal;
}
