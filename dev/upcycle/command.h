// command.h: --help and the parser.
#pragma once

static void print_usage(FILE* out) {
    fprintf(out,
            "upcycle %s: makes a dense model a mixture of experts, or a mixture of experts a\n"
            "larger or smaller one.\n"
            "  ./upcycle SRC DST --experts N [options]\n"
            "SRC and DST are Hugging Face directories; SRC is only read, DST must not exist.\n"
            "Examples\n"
            "  ./upcycle DENSE MOE --experts 8 --topk 2\n"
            "  ./upcycle MOE LARGER --experts 16 --method family\n"
            "  ./upcycle --inspect MOE --data my.txt\n",
            VERSION);
}

// The choices of an option that has too many for its line, in lines of their own.
static void print_choices(const char* title, const char* choices) {
    int column = printf("      %s", title);
    while (*choices) {
        int n = (int)strcspn(choices, "|");
        n += choices[n] == '|';
        if (column + n > 79) column = printf("\n      ") - 1;
        column += printf("%.*s", n, choices);
        choices += n;
    }
    printf("\n");
}

static void print_upcycle_help(void) {
    static const struct {
        const char *first, *title;
    } titles[] = {{"experts", "The result"},
                  {"norm-topk", "From a dense model"},
                  {"drop-ratio", "Methods"},
                  {"select", "From a mixture of experts"},
                  {"inspect", "Instead of an upcycle"}};
    print_usage(stdout);
    for (int i = 0; i < NUM_ASKED; i++) {
        const Option* o = &ask_table[i];
        char start[48] = "";
        for (size_t g = 0; g < sizeof titles / sizeof titles[0]; g++)
            if (!strcmp(o->name, titles[g].first)) printf("%s\n", titles[g].title);
        if (o->start && o->type != OPT_FLAG) snprintf(start, sizeof start, "%s(%s)", *o->help ? " " : "", o->start);
        if (!strcmp(o->name, "method")) {
            printf("  --method M (copy)\n");
            print_choices("dense SRC: ", DENSE_METHODS);
            print_choices("MoE SRC: ", MOE_METHODS);
            continue;
        }
        if (!strcmp(o->name, "router") || !strcmp(o->name, "select")) {
            printf("  --%s M: %s%s\n", o->name, o->help, start);
            print_choices("", o->argument);
            continue;
        }
        char text[80];
        snprintf(text, sizeof text, "  --%s %s", o->name, o->argument);
        printf("%-25s %s%s\n", text, o->help, start);
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
    while ((c = getopt_long(argc, argv, ":h", longs, NULL)) != -1) {
        int index = c - 256;
        if (c == ':') die(2, "%s wants a value; see --help", argv[optind - 1]);
        if (c == '?' && optopt > 0 && optopt < 256) die(2, "-%c: unknown option; see --help", optopt);
        if (c == '?') option_unknown(argv[optind - 1], longs);
        if (index == NUM_ASKED || c == 'h') {
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
