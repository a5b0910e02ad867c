# The two commands of the README (demo, test) do all their set-up themselves.
PYTHON ?= python3
VENV   ?= .venv
PY      = $(VENV)/bin/python
PIP     = $(PY) -m pip --disable-pip-version-check -q

SOURCES = pyproject.toml $(wildcard kvmhost/_core/*.[ch] kvmhost/_core/*.cdef kvmhost/_core/build.py) \
          $(wildcard guests/*.py guests/x86_64/*.[chS] guests/x86_64/*.ld)

.PHONY: demo test test-slow lab-test lab-test-slow lint sanitize fuzz guests clean

demo: $(VENV)/.demo
	$(VENV)/bin/kvmhost demo

test: $(VENV)/.test
	$(PY) -m pytest -m "not slow and not lab" $(PYTEST_ARGS)

test-slow: $(VENV)/.test
	$(PY) -m pytest -m "slow and not lab" --timeout 3600 -o faulthandler_timeout=0 $(PYTEST_ARGS)

# Emulated hosts, one after another: one short job for each architecture, or all jobs.
lab-test: $(VENV)/.test
	$(PY) -m pytest tests/lab -m "lab and not slow" -o faulthandler_timeout=0 $(PYTEST_ARGS)

lab-test-slow: $(VENV)/.test
	$(PY) -m pytest tests/lab tests/docs/test_examples.py -m lab -o faulthandler_timeout=0 $(PYTEST_ARGS)

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The C core's stress under ThreadSanitizer and AddressSanitizer; SECONDS_EACH=60 for long.
sanitize:
	$(MAKE) -C tests/sanitize run

# Every fuzz target for long: by coverage where atheris is installed, else by hypothesis.
FUZZ_SECONDS ?= 600
FUZZ_EXAMPLES ?= 100000
FUZZ_TARGETS ?= api clock config damon dirty fwcfg journal loaders lru_gen record serial snapshot text units
fuzz: $(VENV)/.test
	if $(PY) -c 'import atheris' 2>/dev/null; then \
	  for target in $(FUZZ_TARGETS); do \
	    $(PY) tests/fuzz/fuzz.py $$target -max_total_time=$(FUZZ_SECONDS) || exit 1; \
	  done; \
	else \
	  FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(PY) -m pytest tests/fuzz --timeout 0 -o faulthandler_timeout=0; \
	fi

guests: $(VENV)/.demo
	$(PY) -m kvmhost.guests.build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "pip>=23.1"

# What the README shows beyond booting needs these.
EXTRAS.demo = plot,record,watch

# One stamp a set of extras; each re-installs when a source of the C core changes.
$(VENV)/.demo $(VENV)/.test $(VENV)/.lint: $(VENV)/.%: $(SOURCES) | $(VENV)/bin/python
	KVMHOST_WERROR=1 $(PIP) install -e ".[$(or $(EXTRAS.$*),$*)]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info kvmhost/_core/*.so guests/x86_64/*.elf
