// command.h: --help and the parser.
#pragma once

static void print_upcycle_help(void) {
    static const struct {
        const char *first, *title;
    } titles[] = {{"experts", "The result"},
                  {"norm-topk", "From a dense model"},
                  {"drop-ratio", "Methods"},
                  {"select", "From a mixture of experts"},
                  {"inspect", "Instead of an upcycle"}};
    printf(
        "upcycle %s: SRC DST --experts N [options]: a dense model becomes a mixture of experts, a mixture of experts a "
        "larger\n"
        "or smaller one. SRC and DST are Hugging Face directories; SRC is only read, DST must not exist.\n",
        VERSION);
    for (int i = 0; i < NUM_ASKED; i++) {
        const Option* o = &ask_table[i];
        char start[48] = "";
        for (size_t g = 0; g < sizeof titles / sizeof titles[0]; g++)
            if (!strcmp(o->name, titles[g].first)) printf("%s\n", titles[g].title);
        if (o->start && o->type != OPT_FLAG) snprintf(start, sizeof start, "%s(%s)", *o->help ? " " : "", o->start);
        if (!strcmp(o->name, "method")) {
            printf("  --method M (copy)\n      dense SRC: %s\n      MoE SRC:   %s\n", DENSE_METHODS, MOE_METHODS);
            continue;
        }
        if (!strcmp(o->name, "router") || !strcmp(o->name, "select")) {
            printf("  --%s %s\n      %s%s\n", o->name, o->argument, o->help, start);
            continue;
        }
        char text[80];
        snprintf(text, sizeof text, "  --%s %s", o->name, o->argument);
        printf("%-44s %s%s\n", text, o->help, start);
    }
}

static void ask_parse(int argc, char** argv) {
    struct option longs[NUM_ASKED + 3];
    memset(longs, 0, sizeof longs);
    for (int i = 0; i < NUM_ASKED; i++) {
        Option* o = &ask_table[i];
        o->given = 0;
        if (o->start)
            option_set(o, o->start);
        else if (o->type == OPT_WHOLE)
            *(long*)o->value = UNSET;
        else if (o->type == OPT_REAL)
            *(double*)o->value = UNSET;
        else
            *(const char**)o->value = NULL;
        longs[i].name = o->name;
        longs[i].has_arg = o->type == OPT_FLAG ? no_argument : required_argument;
    }
    longs[NUM_ASKED].name = "help";
    longs[NUM_ASKED + 1].name = "version";
    for (int i = 0; i < NUM_ASKED + 2; i++) longs[i].val = 256 + i; // see options_parse
    opterr = 0;
    optind = 0;
    int c;
    while ((c = getopt_long(argc, argv, ":", longs, NULL)) != -1) {
        int index = c - 256;
        if (c == ':') die(2, "%s wants a value; see --help", argv[optind - 1]);
        if (c == '?' && optopt > 0 && optopt < 256) die(2, "-%c: unknown option; see --help", optopt);
        if (c == '?') option_unknown(argv[optind - 1], longs);
        if (index == NUM_ASKED) {
            print_upcycle_help();
            exit(0);
        }
        if (index == NUM_ASKED + 1) {
            printf("upcycle %s\n", VERSION);
            exit(0);
        }
        option_set(&ask_table[index], ask_table[index].type == OPT_FLAG ? "1" : optarg);
        ask_table[index].given = 1;
    }
}
