# Settings: change them here or on the command line (make V=1 CC=clang PREFIX=/opt/moec).
PREFIX  = /usr/local
DESTDIR =
B       = build
CC      = gcc
OPT     = -O2 -g
SAN     =
WARN    = -Wall -Wextra -Werror -Wno-missing-field-initializers
# No fused multiply-add: the planner's and the reference's figures agree on every machine.
CFLAGS  = -std=gnu11 $(OPT) $(WARN) -ffp-contract=off $(SAN)
LIBS    = -l:libyaml.a -l:liblua5.4.a -l:libsodium.a -lm -ldl -lpthread -Wl,--wrap=pow
SUITE   =# tests to run, as Criterion's --filter; empty: all
V       =

VERSION := $(shell sed -n 's/^\#define MOEC_VERSION "\(.*\)"/\1/p' compiler/moec.h)
ROOT     = $(DESTDIR)$(PREFIX)
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
Q       := $(if $(V),,@)
say      = $(if $(V),,@printf '  %-8s %s\n' $(1) $(2))

objects  = $(addprefix $(B)/obj/,$(addsuffix .o,$(basename $(1))))
EMBEDDED = $(wildcard templates/*.cu* templates/*.h plans/clusters/*.yaml lua/*.lua)
COMPILER = $(call objects,$(sort $(wildcard compiler/*.c compiler/*.S)))
RUNTIME  = $(call objects,$(sort $(wildcard runtime/*.c)) $(wildcard compiler/balance*.c) compiler/split.c)
TESTS    = $(call objects,$(sort $(wildcard tests/test_*.c)))
GPU      = $(call objects,tests/gpu.c)
PARTS    = $(filter-out $(B)/obj/compiler/main.o,$(COMPILER))
MAN      = $(addprefix $(B)/obj/,compiler/moec.1 compiler/moec-plan.5 runtime/moert.3 \
    runtime/moec-bundle.5)

all: $(B)/moec $(B)/libmoert.so $(B)/libmoert.a ; @:
help:
	@sed -n 's/^#: //p' Makefile
#: make            build/moec, build/libmoert.so, build/libmoert.a
#: make demo       install what is missing, build, compile a real model's plan, run and check it
#: make test       install what is missing, build, run every test (SUITE='layer/*' picks)
$(B)/moec: $(COMPILER) $(B)/libmoert.a
	$(call say,link,$@)
	$(Q)$(CC) $(CFLAGS) $(LDFLAGS) -o $@ $^ $(LIBS)
$(B)/libmoert.a: $(RUNTIME)
	$(call say,ar,$@)
	$(Q)mkdir -p $(@D) && rm -f $@ && ar rcs $@ $^
$(B)/libmoert.so: $(RUNTIME)
	$(call say,link,$@)
	$(Q)$(CC) $(CFLAGS) $(LDFLAGS) -shared -Wl,-soname,libmoert.so.0 -Wl,--exclude-libs,ALL \
	    -o $@ $^ -l:libsodium.a -lm -ldl -lpthread
$(B)/tests: $(TESTS) $(PARTS) $(B)/libmoert.a
	$(call say,link,$@)
	$(Q)$(CC) $(CFLAGS) $(LDFLAGS) -o $@ $^ $(LIBS) -lcriterion
$(B)/gpu_tests: $(GPU) $(PARTS) $(B)/libmoert.a
	$(call say,link,$@)
	$(Q)$(CC) $(CFLAGS) $(LDFLAGS) -o $@ $^ $(LIBS)

$(B)/obj/%.o: %.c
	$(call say,cc,$<)
	$(Q)mkdir -p $(@D) && $(CC) $(CFLAGS) $(CPPFLAGS) -MMD -MP -c -o $@ $<
$(B)/obj/%.o: %.S $(EMBEDDED)
	$(call say,as,$<)
	$(Q)mkdir -p $(@D) && $(CC) $(CPPFLAGS) -Wa,-I. -c -o $@ $<
$(RUNTIME): CFLAGS += -fPIC -fvisibility=hidden
-include $(COMPILER:.o=.d) $(RUNTIME:.o=.d) $(TESTS:.o=.d) $(GPU:.o=.d)

setup:
	$(Q)tests/setup.sh
demo: setup
	$(Q)$(MAKE) --no-print-directory all
	$(Q)B=$(B) examples/demo.sh
test: setup
	$(Q)$(MAKE) --no-print-directory check
#: make check      the tests, without installing anything
check: all $(B)/tests
	$(Q)B=$(B) CC='$(CC)' SAN='$(SAN)' tests/run.sh $(B)/tests '$(SUITE)'
#: make test-gpu   the tests that want a GPU
test-gpu: all $(B)/gpu_tests
	$(Q)tests/need_gpu.sh test-gpu && B=$(B) tests/gpu.sh
#: make bench      timings on a GPU, against the floor the hardware sets
bench: all
	$(Q)tests/need_gpu.sh bench && B=$(B) tests/bench.sh
#: make golden     rewrite the expected results in tests/golden; read git diff afterwards
golden: $(B)/tests
	$(Q)MOEC_GOLDEN=1 tests/run.sh $(B)/tests 'golden/*'
#: make asan       every test under AddressSanitizer and UndefinedBehaviorSanitizer
asan:
	$(Q)$(MAKE) --no-print-directory B=build-asan OPT='-O1 -g' SAN='$(SANITIZE)' check
#: make valgrind   the runtime on the host under valgrind
valgrind: all
	$(Q)B=$(B) tests/valgrind.sh
#: make lint       formatting, forbidden words, long functions, shell scripts
lint:
	$(Q)tests/lint.sh
#: make format     clang-format every source in place
format:
	$(Q)clang-format -i $(wildcard compiler/*.[ch] runtime/*.[ch] templates/*.cu* templates/*.h \
	    tests/*.[ch] examples/*/*.c)

#: make install    into PREFIX (default /usr/local), below DESTDIR
install: all $(if $(shell command -v scdoc),$(MAN))
	$(Q)install -d $(addprefix $(ROOT)/,bin lib/pkgconfig include share/moec)
	$(Q)install -m755 $(B)/moec $(ROOT)/bin
	$(Q)install -m755 $(B)/libmoert.so $(ROOT)/lib/libmoert.so.$(VERSION)
	$(Q)cd $(ROOT)/lib && ln -sf libmoert.so.$(VERSION) libmoert.so.0 && ln -sf libmoert.so.0 libmoert.so
	$(Q)install -m644 $(B)/libmoert.a $(ROOT)/lib
	$(Q)install -m644 runtime/moert.h $(ROOT)/include
	$(Q)sed 's|@PREFIX@|$(PREFIX)|; s|@VERSION@|$(VERSION)|' runtime/moert.pc.in \
	    >$(ROOT)/lib/pkgconfig/moert.pc
	$(Q)cp -r plans $(ROOT)/share/moec
	$(Q)for page in $(filter $(MAN),$^); do \
	    install -D -m644 $$page $(ROOT)/share/man/man$${page##*.}/$${page##*/}; done
	$(if $(filter $(MAN),$^),,@echo "install: scdoc is missing, man pages are left out")
$(B)/obj/%: %.scd
	$(Q)mkdir -p $(@D) && scdoc <$< >$@
#: make uninstall  what install put there
uninstall:
	$(Q)cd $(ROOT) && rm -rf share/moec bin/moec lib/libmoert.* lib/pkgconfig/moert.pc \
	    include/moert.h $(foreach p,$(MAN),share/man/man$(subst .,,$(suffix $p))/$(notdir $p))
#: make clean      remove build/ and build-asan/
clean:
	$(Q)rm -rf build build-*
.PHONY: all help setup demo test check test-gpu bench golden asan valgrind lint format install \
    uninstall clean
