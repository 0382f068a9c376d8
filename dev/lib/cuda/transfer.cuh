// transfer.cuh: copies between the host's model and the GPU's, gpu_send and gpu_read_back, and the sums of losses and
// load that the GPU keeps. Needs memory.cuh, gpu_take_loss and gpu_convert of train_moe.cu.
#pragma once

template <class Real> static void gpu_send(Model* m, int what) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    size_t bytes = sizeof(float) * (size_t)m->layout.total;
    if ((what & PARAMETERS) && !m->owner) {
        CHECK(cudaMemcpy(g->params, m->params, bytes, cudaMemcpyHostToDevice));
        if (sizeof(Real) != sizeof(float)) gpu_convert(g->copy, g->params, m->layout.total);
    }
    if (what & MOMENTS) {
        CHECK(cudaMemcpy(g->exp_avg, m->exp_avg, bytes, cudaMemcpyHostToDevice));
        CHECK(cudaMemcpy(g->exp_avg_sq, m->exp_avg_sq, bytes, cudaMemcpyHostToDevice));
    }
    for (int l = 0; (what & ROUTER_BIASES) && l < m->config.num_layers; l++)
        if (m->weights.layers[l].router_bias)
            CHECK(cudaMemcpy(g->w.layers[l].router_bias, m->weights.layers[l].router_bias,
                             sizeof(float) * (size_t)m->config.num_experts, cudaMemcpyHostToDevice));
    if (m->config.num_experts > 0)
        CHECK(cudaMemcpy(g->family, m->family,
                         sizeof(int) * (size_t)m->config.num_layers * (size_t)m->config.num_experts,
                         cudaMemcpyHostToDevice));
}

// Numbers of the GPU as floats of the host.
static void to_host(float* out, const float* x, long n) {
    CHECK(cudaMemcpy(out, x, sizeof(float) * (size_t)n, cudaMemcpyDeviceToHost));
}
static void to_host(float* out, const bf16* x, long n) {
    uint16_t* half = (uint16_t*)checked_malloc(sizeof(uint16_t) * (size_t)n);
    CHECK(cudaMemcpy(half, x, sizeof(uint16_t) * (size_t)n, cudaMemcpyDeviceToHost));
    for (long i = 0; i < n; i++) out[i] = bf16_to_float(half[i]);
    free(half);
}

// Adds what the GPU has counted to the host's sums and starts it from zero again.
template <class Real> static void gpu_read_sums(Model* m) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    int L = m->config.num_layers, E = m->config.num_experts;
    if (g->loss_pending) gpu_take_loss<Real>(m, 0);
    CHECK(cudaMemcpy(g->sums_host, g->losses_sum, g->sums_bytes, cudaMemcpyDeviceToHost));
    const double *losses = (const double*)g->sums_host, *observed = losses + (g->observed - g->losses_sum);
    const double* cutoffs = observed + (g->cutoffs - g->observed);
    const long long *load = (const long long*)(losses + 4), *step_load = load + (g->step_load - g->load);
    m->sums.loss += losses[0];
    m->sums.aux += losses[1];
    m->sums.z += losses[2];
    m->sums.lpr += losses[3];
    for (long i = 0; i < (long)L * E; i++) {
        m->load[i] += (long)load[i];
        m->step_load[i] += (long)step_load[i];
        m->cutoffs[i] += cutoffs[i];
    }
    for (int i = 0; i < L * OBSERVED_NUMBERS; i++) ((double*)m->observed)[i] += observed[i];
    gpu_clear_sums<Real>(m);
}

template <class Real> static void gpu_read_back(Model* m, int what) {
    GpuModel<Real>* g = gpu_of<Real>(m);
    const Config* c = &m->config;
    long total = m->layout.total, N = (long)m->batch * m->length;
    if ((what & PARAMETERS) && !m->owner) to_host(m->params, g->params, total);
    if (what & MOMENTS) {
        to_host(m->exp_avg, g->exp_avg, total);
        to_host(m->exp_avg_sq, g->exp_avg_sq, total);
    }
    if (what & GRADIENTS) to_host(m->grads, g->grads, total);
    for (long n = 0, V = c->vocab_size; (what & LOGITS) && n < (m->purpose == FOR_GENERATION ? 1 : N); n++)
        to_host(m->logits + n * V, g->logits + n * logits_row((int)V), V);
    for (int l = 0; (what & ROUTING) && l < c->num_layers; l++) {
        if (!c->sparse[l]) continue;
        long n = N * m->topk[l];
        CHECK(cudaMemcpy(m->layers[l].experts, g->layers[l].experts, sizeof(int) * (size_t)n, cudaMemcpyDeviceToHost));
        to_host(m->layers[l].gates, g->layers[l].gates, n);
    }
    if (what & LOSSES) gpu_read_sums<Real>(m);
}
