// backend.h: where a model is computed. Needs AdamW.
//
// train_moe.c's functions do it on the CPU. train_moe.cu's do it on a GPU, where parameters, moments, gradients and
// results lie in memory of the GPU's own; the host's copies, which saving, loading and reporting work on, are brought
// up to date by `send` and `read_back`. On the CPU these have nothing to do.
#pragma once

typedef struct Model Model;
enum { PARAMETERS = 1, MOMENTS = 2, GRADIENTS = 4, LOGITS = 8, ROUTING = 16, LOSSES = 32, ROUTER_BIASES = 64 };

typedef struct {
    void (*plan)(Model* m);             // counts the memory: Model.bytes and its parts
    void (*allocate)(Model* m);         // takes it
    void (*release)(Model* m);          // and gives it back
    // model_forward, model_backward and model_update, or NULL: train_moe.c's own. A GPU's forward returns 0: its losses
    // come later, and take_losses fetches them.
    double (*forward)(Model* m, const int* tokens, const int* targets, int B, int T);
    void (*backward)(Model* m, float scale);
    double (*update)(Model* m, const AdamW* o, double lr, long step);
    void (*send)(Model* m, int what);       // PARAMETERS, MOMENTS, ROUTER_BIASES; always: the families
    void (*read_back)(Model* m, int what);  // any of the above; ROUTING: experts, gates; LOSSES: Model.sums, load
} Backend;
