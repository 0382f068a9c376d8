#!/usr/bin/env python3
"""Breaks train_moe.c and dev/lib in one place at a time and checks that the tests notice. Run from the project's folder:

    python3 dev/mutations.py [WORD]       only the mutations whose text contains WORD

A test suite that stays green on a broken program proves nothing. Each mutation replaces a piece of text, which must
stand in these files exactly once, by a wrong one. Prints a line a mutation and ends with `N passed, N failed`; passed
means caught.
"""
import pathlib
import shutil
import subprocess
import sys
import tempfile

MUTATIONS = [
    # matrix products and the threads' shares of them
    ("w->share[s].end = unit + 1;", "w->share[s].end = unit;"),
    ("for (; *helped < w->shares; ++*helped) {", "for (; *helped < 1; ++*helped) {"),
    ("const float* s = left + k * left_k + part_begin(t, tiles, rows);",
     "const float* s = left + k * left_k + part_begin(t, tiles, rows) + (t > 3);"),
    ("s->start + (s->tile ? t * s->tile : first);", "s->start + (s->tile ? t * s->tile : t * TILE_ROWS);"),
    # bf16: rounding, order, what stays fp32, small numbers
    ("(0x7FFFu + ((bits) >> 16 & 1u))", "0x8000u"),
    ("BF16_OPERAND(bits) ROUND_TO_BF16(FLUSHED_BITS(bits))", "BF16_OPERAND(bits) ROUND_TO_BF16(bits)"),
    ("k = ++n ^ 1)", "k = ++n)"),
    ("*(words*)(packed + (k + 1) * width) = BF16_OPERAND((words)row);",
     "*(words*)(packed + k * width) = BF16_OPERAND((words)row);"),
    ("now = before | FLUSH_DENORMALS;", "now = before;"),
    ("    if (how == PACK_ROUNDED) restore_mode(mode);\n", ""),
    ("k + 1 < depth ? s + left_k + v : NULL);", "s + left_k + v);"),
    ("int few = bf16_products ? FEW_ROWS + 1 : rows;", "int few = rows;"),
    # bf16 by AMX: order, zeros beyond the depth, sizes of tiles, small numbers
    ("if (!amx || n % 32 < 31) continue;", "if (!amx || n % 16 < 15) continue;"),
    ("even = FLUSHED(even + FLUSHED(l << 16)", "odd = FLUSHED(odd + FLUSHED(l << 16)"),
    ("even = FLUSHED(even + odd);\n", "tiles[c][i] = (TileWords)FLUSHED(FLUSHED(tiles[c][i]) + odd);\n"),
    ("memset(packed + pairs * TILE_COLUMNS, 0,", "memset(packed + pairs * TILE_COLUMNS, 255,"),
    ("memcpy(pairs, block, blocks_of(count, 2) * LEFT_WIDTH * sizeof(float));", "memcpy(pairs, block, sizeof pairs);"),
    ("count < 2 * LINE ? memcpy(edge, row, count * sizeof(float)) : row", "row"),
    ("if (rows != shaped_rows) {", "if (!shaped_rows) {"),
    ("(uint8_t)(t < 3 ? rows : LINE)", "(uint8_t)(t < 3 ? TILE_ROWS : LINE)"),
    ("FLUSHED(FLUSHED(tiles[c][i]) + even)", "FLUSHED((TileRow)tiles[c][i] + even)"),
    ("IN_FP32(router_forward(m, l));", "router_forward(m, l);"),
    # what is bf16
    ("    multiply_block(p, ld, q_bh, ld_q, 1, k_bh, 1, ld_k, rows, keys, HD, 0);",
     "    IN_FP32(multiply_block(p, ld, q_bh, ld_q, 1, k_bh, 1, ld_k, rows, keys, HD, 0));"),
    ("    multiply_block(dv_b, ld_dv, p, 1, ld, dout_bh, ld_out, 1, keys, HD, rows, add);",
     "    IN_FP32(multiply_block(dv_b, ld_dv, p, 1, ld, dout_bh, ld_out, 1, keys, HD, rows, add));"),
    ("    grouped_matmul_forward(t->y_rows, t->act, w->down, down_size, I, H, E, s->offsets);",
     "    IN_FP32(grouped_matmul_forward(t->y_rows, t->act, w->down, down_size, I, H, E, s->offsets));"),
    ("    grouped_matmul_backward_weight(dw->gate_up, dgate_up, t->x_rows, gate_up_size, H, 2 * I, E, s->offsets);",
     "    IN_FP32(grouped_matmul_backward_weight(dw->gate_up, dgate_up, t->x_rows, gate_up_size, H, 2 * I, E, "
     "s->offsets));"),
    # a run's precision
    ("USE_RUN, &options.precision,", "USE_OTHER, &options.precision,"),
    ('text_print(&what, ", --precision %s", precision->string);', ";"),
    # layers
    ("s *= r * r / size;", "s *= r / size;"),
    ("float d = r * (dout_ng[i] * weight[i] - x_ng[i] * s);", "float d = r * (dout_ng[i] * weight[i] + x_ng[i] * s);"),
    ("sums_b[i] += dout_ng[i] * x_ng[i] * r;", "sums_b[i] += dout_ng[i] * x_ng[i];"),
    ("dx_ng[i] = add ? dx_ng[i] + d : d;", "dx_ng[i] = d;"),
    ("float s = direction * sin_t[i],", "float s = sin_t[i],"),
    ("b[i] = b_i * cos_t[i] + a_i * s;", "b[i] = b_i * cos_t[i] - a_i * s;"),
    ("ds_i[j] = p_i[j] * (ds_i[j] - D) * scale;", "ds_i[j] = p_i[j] * (ds_i[j] + D) * scale;"),
    ("ds_i[j] = p_i[j] * (ds_i[j] - D) * scale;", "ds_i[j] = p_i[j] * (ds_i[j] - D);"),
    ("p_i[j] = fast_exp(scale * p_i[j] - lse_i);", "p_i[j] = fast_exp(p_i[j] - lse_i);"),
    ("p_i[j] = -INFINITY;", "p_i[j] = -3e38f;"),
    ("out_bh[(long)i * NH * HD + d] *= inverse_sums[i];", "out_bh[(long)i * NH * HD + d] *= 1;"),
    ("first >= 0; first -= QUERY_BLOCK, add = 1)", "first >= 0; first -= QUERY_BLOCK)"),
    ("logits_n[targets[n]] -= scale;", "logits_n[targets[n]] += scale;"),
    ("lse[n] = max + logf(sum);\n        losses[n]", "lse[n] = logf(sum);\n        losses[n]"),
    ("for (int i = 0; i < width; i++) drow[i] += dout_row[i];",
     "for (int i = 0; i < width; i++) drow[i] = dout_row[i];"),
    # experts and routing
    ("dg[i] = gate * dact_r[i] * u_i * s * (1.0f + g[i] * (1.0f - s));",
     "dg[i] = gate * dact_r[i] * u_i * s * (1.0f - s);"),
    ("du[i] = gate * dact_r[i] * silu;", "du[i] = dact_r[i] * silu;"),
    ("act[i] = gate * silu * u_i;", "act[i] = silu * u_i;"),
    ("dgate += dact_r[i] * silu * u_i;", "dgate += dact_r[i] * silu;"),
    ("dz[e] = norm_topk ? 0 : -p[e] * mean;", "dz[e] = norm_topk ? 0 : p[e] * mean;"),
    ("(norm_topk ? dgates_n[k] - mean : dgates_n[k]);", "dgates_n[k];"),
    ("(norm_topk ? dgates_n[k] - mean : dgates_n[k]);", "(dgates_n[k] - mean);"),
    ("(p[e] * (aux_weight * (f[e] - mean) + z_weight * lse[n]));", "(p[e] * (aux_weight * f[e] + z_weight * lse[n]));"),
    ("z_weight = 2.0 * scale * m->balance.z / N;", "z_weight = scale * m->balance.z / N;"),
    ("gates_n[k] /= gate_sum;\n    }\n}\n\n// dlogits", "gates_n[k] *= 1;\n    }\n}\n\n// dlogits"),
    ("-1 : offsets[experts[a]]++;", "-1 : offsets[experts[a]];"),
    # the model
    ("matmul_backward_weight(dw->attn_out, t->dx, s->attn,", "matmul_backward_weight(dw->attn_out, t->dx, s->x_mid,"),
    ("    matmul_backward_input(t->dnormed, t->drouter, m->weights.layers[l].router, N, H, E, 1);\n", ""),
    ("float correction1 = (float)(1 - pow(o->beta1, (double)step))",
     "float correction1 = (float)(1 - pow(o->beta2, (double)step))"),
    ("scale = o->clip / (norm + 1e-6);", "scale = 1;"),
    ("m->ones, w->qkv_bias, N, qkv_width(c), 1, 1));", "m->ones, w->qkv_bias, N, qkv_width(c), 1, 0));"),
    ("if (w->qkv_bias) IN_FP32(matmul_backward_weight(dw->qkv_bias, t->dqkv, m->ones, N, 1, QKV));", ""),
    # the shared expert
    ("dz[n] *= g[n] * (1.0f - g[n]);", "dz[n] *= g[n];"),
    ("combine_rows(out, out, t->y_rows, g, m->identity, N, 1, H);",
     "combine_rows(out, s->x_mid, t->y_rows, g, m->identity, N, 1, H);"),
    ("matmul_backward_input(t->dnormed, dgate_up, w->shared_gate_up, N, H, 2 * S, 1);",
     "matmul_backward_input(t->dnormed, dgate_up, w->shared_gate_up, N, H, 2 * S, 0);"),
    ("    IN_FP32(matmul_backward_input(t->dnormed, dz, w->shared_gate, N, H, 1, 1));\n", ""),
    # router variants
    ("float dgate = scaling * dgates_n[k];", "float dgate = dgates_n[k];"),
    ("dz_n[e] = dz_n[e] * s * (1.0f - s) +", "dz_n[e] = dz_n[e] * s +"),
    ("norm_topk ? (dgate - mean) / chosen_sum : dgate;",
     "norm_topk ? dgates_n[k] / chosen_sum : dgates_n[k];"),
    ("dz_n[e] = (float)(lambda / r * (dz_n[e] - through_std));", "dz_n[e] = (float)(lambda / r * dz_n[e]);"),
    ("dscore * (p[d] / p_length - score * mu[d] / length) / length;",
     "dscore * (p[d] / p_length + score * mu[d] / length) / length;"),
    ("dscore * (mu[d] / length - score * p[d] / p_length) / p_length;", "dscore * (mu[d] / length) / p_length;"),
    ("(g - along * x_i[d]) / square);", "g / square);"),
    ("weight * c->router.lpr_kl / N * -0.5 * (1 - exp((double)logvar[d]))",
     "weight * c->router.lpr_kl / N * 0.5 * (1 - exp((double)logvar[d]))"),
    ("dz[(long)n * E + e] += p[e] * (dp[e] - mean);", "dz[(long)n * E + e] += p[e] * dp[e];"),
    ("rstd[n] * (du[i] * weight[i] - d_mean - xhat * d_along);", "rstd[n] * (du[i] * weight[i] - xhat * d_along);"),
    ("shift[(long)n * E + e] = best ? 0 : penalty;", "shift[(long)n * E + e] = best ? penalty : 0;"),
    ("(float)(over < 0 ? rate : over > 0 ? -rate : 0);", "(float)(over > 0 ? rate : over < 0 ? -rate : 0);"),
    # files
    ("text_add(t, v->raw, strlen(v->raw));", "text_json_value(t, v);"),
    ("if (!v || key_is_owned(c, v->key)) continue;", "if (!v || key_is_owned(c, v->key) || v->type < JSON_NUMBER) continue;"),
    ("if (!strcmp(config_keys[k].names, part))", "if (0)"),
    ('luggage_number(j, c->arch, "use_sliding_window") == 0', '!json_absent(json_get(j, "use_sliding_window"))'),
    ("below == NO_KEY ? c->num_layers : imax(0, c->num_layers - (int)below)", "c->num_layers"),
    ("else if (n > 0) text_add(t, s, (size_t)n);", "else if (n > 0) text_add(t, s, 1);"),
    # random numbers, the command line, signals
    ("p = p * t2 + 2.0 / 13;", "p = p * t2 + 2.0 / 14;"),
    ("return told == 0 ? NO_BYTES :", "return"),
    ("|| r->run->steps > 0 || r->first_step > 0)", "|| r->run->steps > 0)"),
    ("if (options.warmup == UNSET && options.steps > 0)", "if (options.warmup == UNSET)"),
    ('if (found == 1) die(2, "%s: the option takes no value", argument);', ""),
    ("} else if (seconds() - first > 1) {", "} else {"),
    # tokenizers
    ("return a.rank != b.rank ? a.rank < b.rank : a.at < b.at;", "return a.at < b.at;"),
    ("if (left->before >= 0) word_offer(e, w, left->before);", ""),
    ("if (now->id != m.id || now->rank != m.rank) continue;", ""),
    ("int whole = e->ignore_merges ? piece_id(e, s, n) : -1;", "int whole = -1;"),
    ("(is_unknown ? !(unknown && e->fuse_unknown) : id >= 0)", "(is_unknown ? 1 : id >= 0)"),
    ("if (capitals && end - s > 2", "if (0 && end - s > 2"),
    ("(capitals ? strncasecmp : strncmp)", "strncmp"),
    ("r->any_before ? !line_end && !(first & NUMBER) : *s == ' ';", "r->any_before ? !(first & NUMBER) : *s == ' ';"),
    ("r->digits ? r->digits : LONG_MAX);", "LONG_MAX);"),
    ("while (r->lines && t < end && (*t == '\\n'", "while (0 && t < end && (*t == '\\n'"),
    ("if (r->lines && line > s) return line;", ""),
    ("return t > s ? t : space_end;", "return space_end;"),
    ('json_flag(j, "individual_digits") ? 1 : INT_MAX', "INT_MAX"),
    ("if (added->strip_right) s = run_of(s, end, SPACE, 0, LONG_MAX);", ""),
    ("|| t + n != part_end) break;", ") break;"),
    ("if (e->added[i].normalized == normalized && starts", "if (starts"),
    ("->rank = i;", "->rank = 0;"),
    ("int whole = blocked ? -1 : composed(", "int whole = composed("),
    ("at > 0 && rank_of(m->characters[at - 1]) > rank; at--)", "0; at--)"),
    ("int whole = m->count == 1 ? composed(", "int whole = m->count > 0 ? composed("),
    ("syllable % 28 == 0 && tail > 0", "tail > 0"),
    ("if (!(second & 1)) table_put", "table_put"),
    ("else marks_write(&m, out), text_add(out, s, 1);", "else text_add(out, s, 1);"),
    ('if (json_contains_type(normalizer, "ByteLevel")) return set_error(error, "its normalizer is ByteLevel");', ""),
    ('return set_error(error, "it has a step after ByteLevel");', "{}"),
    ("(!*scheme && add && add->type == JSON_FALSE) ? NEVER", "!*scheme ? NEVER"),
    ("if (!raw_allowed) f->ids = encoded_take(path, &all), f->width = (int)sizeof(int);",
     "if (!raw_allowed) f->ids = encoded_take(path, &all), f->width = 1;"),
    ("bytes += !t->pieces ? 1 : t->pieces[b.targets[k]] ? t->lengths[b.targets[k]] : 0;", "bytes += 1;"),
    ("if (f->ids[k] < 0 || f->ids[k] >= d->vocab_size)", "if (0)"),
    # the tokenizer of a new model, prompts from standard input
    ("if (*vocab_size < size)", "if (0)"),
    ("if (id >= size) size = id + 1;", ""),
    ("found = id >= 0 || (i < 2 && ids && (ids->type == JSON_NULL || are_ids(ids, size)));", "found = id >= 0;"),
    ("json_whole(j, size - 1) >= 0;", "json_whole(j, INT_MAX) >= 0;"),
    ("if (json_get(name, \"content\")) name = json_get(name, \"content\");", ""),
    ("if (tokenizer) m->luggage = luggage_new(c->arch, tokens.data);", ""),
    ("tokenizer_add_ends(tokenizer, trained->luggage);\n", "\n"),
    ('if (!m->source) unlink(join_path(path, dir, "upcycle.json"));', ""),
    ("if (tokenizer && !m->reads_bytes) tokenizer_hash(tokenizer, run_tokenizer);", ""),
    ("!tokenizer_is_bytes(out);", "0;"),
    ("if (!same_tokenizer(options.tokenizer, dir))", "if (0)"),
    ("if (!e || --e->users > 0) return;", "if (!e) return;"),
    ("while (e && strcmp(e->path, path)) e = e->next;", "e = NULL;"),
    ("if (!typed && t->length && t->data[t->length - 1] == '\\n') t->length--;", ""),
    ("while ((ch = getchar()) != EOF && !(typed && ch == '\\n')) {", "while ((ch = getchar()) != EOF && ch != '\\n') {"),
    # long values in json, experts that are skipped
    ("    text_add(t, all, (size_t)n);\n", "    text_add(t, all, 1023);\n"),
    ("gates_n[k] = scaling * (gates_n[k] / sum);", "gates_n[k] = gates_n[k] / sum;"),
    # how many experts a token gets
    ("all || left < r->dynamic_least || reached", "left < r->dynamic_least || reached"),
    ("(float)(weight * q / (q - 1) * (pow(p[e], q) - p[e] * powers));",
     "(float)(weight / (q - 1) * (pow(p[e], q) - p[e] * powers));"),
    ("for (int k = 0; k < left && norm_topk; k++) gates[k] /= reached;", ""),
]

GROUPS = ["tokenizer", "texts", "golden", "routers", "balance", "families", "gradients", "matmul", "bf16", "checkpoints",
          "loader", "luggage", "json", "data", "command line", "determinism"]


def main():
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    files = {str(path): path.read_text() for path in [pathlib.Path("train_moe.c"), *sorted(pathlib.Path("dev/lib").glob("*.h"))]}
    source = "\0".join(files.values())
    caught = missed = 0
    for right, _ in MUTATIONS:  # all of them, also when only some are tried
        if source.count(right) != 1:
            print(f"FAILED stands {source.count(right)} times in train_moe.c and dev/lib: {right!r}")
            missed += 1
    subprocess.run(["make", "-s", "build/embedded.h"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        shutil.copytree("dev", folder / "dev")
        (folder / "build").mkdir()
        for name in ("train_moe.c", "upcycle.c", "test_moe.c", "LICENSE", "build/embedded.h"):
            shutil.copy(name, folder / name)

        def turns_red():
            subprocess.run(["cc", "-std=gnu11", "-O1", "-fexpensive-optimizations", "-march=native", "-fno-math-errno",
                            "-fopenmp", "-DBF16_MODEL", "-DAMX_MODEL", "test_moe.c", "-o", "test", "-lm"], cwd=folder,
                           check=True, capture_output=True)
            for group in GROUPS:
                try:
                    if subprocess.run(["./test", group], cwd=folder, capture_output=True, timeout=300).returncode:
                        return group
                except subprocess.TimeoutExpired:
                    return group
            return None

        wanted = [m for m in MUTATIONS if word in "".join(m) and source.count(m[0]) == 1]
        if word and not wanted:
            sys.exit(f"no mutation has {word!r} in its text")
        if wanted and (group := turns_red()):       # else every change would count as noticed
            sys.exit(f"the tests of {group} fail without a change, too")
        for right, wrong in wanted:
            broken = next(path for path, text in files.items() if right in text)
            (folder / broken).write_text(files[broken].replace(right, wrong))
            group = turns_red()
            (folder / broken).write_text(files[broken])
            print(f"{'ok    ' if group else 'FAILED'} {right.splitlines()[0]}  ->  {wrong.split(chr(10))[0]}", flush=True)
            caught, missed = caught + bool(group), missed + (not group)
    print(f"{caught} passed, {missed} failed")
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
