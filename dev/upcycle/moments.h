// moments.h: AdamW's moments, carried over so that train_moe --resume goes on with the result.
//
// They go where their weights go and are 0 where a weight is new. With `scale` the first is divided by the number of
// copies and the second by its square: twins share the tokens of their source, so each sees about 1 / copies of its
// gradient. With `interpolate` a copy's are the mean with those of the next expert.
#pragma once

static void refuse_moments(const Plan* p, const char* src) {
    char path[PATH_SIZE];
    if (p->method->traits & MERGES || (p->dense && (p->num_sources > 1 || !p->method->carry)))
        die(2,
            "--optimizer %s: the experts of this method have no weights that moments could go with; --optimizer reset "
            "fits",
            ask.optimizer);
    if (is(ask.optimizer, "interpolate") && (p->dense || is(p->method->name, "shuffle")))
        die(2, "--optimizer interpolate: %s has no next expert to interpolate with; --optimizer copy fits",
            p->dense ? "a dense model" : "a permuted copy");
    if (access(optimizer_path(path, src), F_OK))
        die(2, "--optimizer %s: %s: %s; --optimizer reset fits a model without moments", ask.optimizer, path,
            strerror(errno));
}

// How the moments of an expert from source e differ from the source's
static void carry_expert(const Plan* p, Target* t, int e, int copy) {
    if (is(ask.optimizer, "interpolate") && copy > 0) t->mix = 0.5;
    if (!is(ask.optimizer, "scale")) return;
    int groups = p->method->traits & PARTS ? 1 : p->M / p->shards;
    double n = p->shards == 1 ? p->copies[(long)t->layer * p->E + e] : groups;
    t->divisor = t->holds == EXP_AVG ? n : n * n;
}

static void carry_router_row(const Plan* p, const Target* t, float* row, const RouterRows* from) {
    const float* next = from->w + (long)((from->e + 1) % from->E) * from->cols;
    double n = p->copies[(long)t->layer * p->E + from->e];
    for (long c = 0; c < from->cols; c++) {
        if (is(ask.optimizer, "interpolate") && from->copy > 0) row[c] = 0.5f * row[c] + 0.5f * next[c];
        if (is(ask.optimizer, "scale")) row[c] = (float)(row[c] / (t->holds == EXP_AVG ? n : n * n));
    }
}

// j, an object, without the members of a comma-separated list
static void text_json_without(Text* t, const Json* j, const char* left_out) {
    text_print(t, "{");
    for (int i = 0, listed = 0; i < j->count; i++) {
        if (lists(left_out, j->items[i]->key)) continue;
        text_print(t, "%s", listed++ ? ", " : "");
        text_json_string(t, j->items[i]->key);
        text_print(t, ": ");
        text_json_value(t, j->items[i]);
    }
    text_print(t, "}");
}

// With moments carried over, the run goes on where it was: ./train_moe --resume --out DST continues the step count, the
// schedule and the bias correction. Only what was counted since the last validation starts again, and the penalty of
// families, if there are new ones: from here, with its own strength and length, which the last one's options are not.
static void write_trainer(const Plan* p, const char* dir) {
    Text t = {NULL, 0, 0};
    const Json* j = p->trainer;
    text_print(&t, "{");
    for (int i = 0; i < j->count; i++) {
        text_print(&t, "%s\n  ", i ? "," : "");
        text_json_string(&t, j->items[i]->key);
        text_print(&t, ": ");
        // what was counted since the last validation was counted of other experts
        if (lists("load,observed,last_load", j->items[i]->key))
            text_print(&t, "[]");
        else if (is(j->items[i]->key, "family_start") && is(p->method->name, "family"))
            text_print(&t, "%ld", json_whole(json_get(j, "step"), LONG_MAX));
        else if (is(j->items[i]->key, "options") && is(p->method->name, "family"))
            text_json_without(&t, j->items[i], "family-steps,family-penalty");
        else
            text_json_value(&t, j->items[i]);
    }
    text_print(&t, "\n}\n");
    save_text(dir, "trainer.json", &t);
}
