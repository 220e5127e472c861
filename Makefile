# What one types here. `make help` lists it.

SHELL := /bin/bash
.DEFAULT_GOAL := build

# The podman bindings without their C libraries: the remote client only, and
# OpenPGP in Go.
TAGS    := remote containers_image_openpgp exclude_graphdriver_btrfs
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
GO      := go
GOBUILD := CGO_ENABLED=0 $(GO) build -trimpath -tags "$(TAGS)"
LDFLAGS := -s -w -X github.com/choiros/agent/internal/version.stamped=$(VERSION)
TOOL    := $(GO) tool -modfile=tools/go.mod
ENV     := $(CURDIR)/test/env/podman-env
IMAGES  := $(CURDIR)/.cache/images
GUESTD  := $(CURDIR)/.cache/guestd
LINT    := $(CURDIR)/.cache/bin/golangci-lint
# Not empty on a Mac.
MAC     := $(filter Darwin,$(shell uname -s))
# The race detector needs a C compiler; without one the tests run without it.
RACE    := $(shell command -v cc >/dev/null && echo -race)

# Which real backends may not be skipped by a test that finds them missing.
export AGENT_REQUIRE ?=
export AGENT_TEST_IMAGES := $(IMAGES)
export AGENT_TEST_GUESTD := $(GUESTD)
export AGENT_TEST_BUNDLE := $(CURDIR)/.cache/bundle
export AGENT_TEST_TRANSLATOR := $(CURDIR)/.cache/translator
export AGENT_TEST_KIT := $(CURDIR)/bin/guest-kit/$(shell $(GO) env GOARCH)

.PHONY: help
help: ## list what one can make
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: go-present
go-present:
	@command -v $(GO) >/dev/null || { echo "Go is missing. Install 1.26 or newer: https://go.dev/doc/install" >&2; exit 1; }

.PHONY: build
build: go-present bin/agent ## build bin/agent, bin/agentctl and bin/guestd; on a Mac the agent is signed
	@$(GOBUILD) -ldflags "$(LDFLAGS)" -o bin/ ./cmd/agentctl
	@GOOS=linux $(GOBUILD) -ldflags "$(LDFLAGS)" -o bin/ ./cmd/guestd

.PHONY: bin/agent
bin/agent: go-present
	@mkdir -p bin
ifdef MAC
	@CGO_ENABLED=1 $(GO) build -trimpath -tags "$(TAGS)" -ldflags "$(LDFLAGS)" -o $@.new ./cmd/agent
	@tools/mac-sign $@.new
	@mv $@.new $@
else
	@$(GOBUILD) -ldflags "$(LDFLAGS)" -o $@ ./cmd/agent
endif

# Of the guests, whatever the machine is that builds it.
ARCH ?= $(shell $(GO) env GOARCH)
.PHONY: guest-kit
guest-kit: go-present ## build what virtual machines boot with (ARCH, the host's; REFRESH=1 for newer packages; on Debian)
	@mkdir -p .cache/guest-kit/$(ARCH)
	@GOOS=linux GOARCH=$(ARCH) $(GOBUILD) -ldflags "$(LDFLAGS)" -o .cache/guest-kit/$(ARCH)/guestd ./cmd/guestd
	@$(GO) run -trimpath ./guest-kit -arch $(ARCH) -cache .cache/guest-kit -guestd .cache/guest-kit/$(ARCH)/guestd -o bin/guest-kit/$(ARCH) $(if $(REFRESH),-refresh) $(if $(ARCHIVE),-archive $(ARCHIVE))

# What a release has: NAME-OS-ARCH, and the guest kits. An agent that runs
# machines on a Mac takes cgo and a signature, and so a Mac to build it; guest
# kits take Debian.
RELEASE := $(foreach arch,amd64 arm64,agentctl-darwin-$(arch) agentctl-linux-$(arch) guestd-linux-$(arch) agent-linux-$(arch))
RELEASE += $(if $(MAC),agent-darwin-$(ARCH),guest-kit-amd64.tar.gz guest-kit-arm64.tar.gz)
SHA256  := $(shell command -v sha256sum || echo shasum -a 256)

.PHONY: release
release: go-present ## build a release's files into bin/release, with SHA256SUMS
	@rm -rf bin/release && mkdir -p bin/release
	@$(MAKE) --no-print-directory $(RELEASE:%=bin/release/%)
	@cd bin/release && $(SHA256) * >SHA256SUMS && cat SHA256SUMS
	@echo "not in it, since $(if $(MAC),a Mac cannot build them: the guest kits; make release on Debian has them,only a Mac can build it: the agent for macOS; make release on a Mac has it)"

bin/release/guest-kit-%.tar.gz:
	@$(MAKE) --no-print-directory guest-kit ARCH=$* ARCHIVE=$@

bin/release/agent-darwin-%: bin/agent
	@cp bin/agent $@

bin/release/%:
	@name=$* && set -- $${name//-/ } && GOOS=$$2 GOARCH=$$3 $(GOBUILD) -ldflags "$(LDFLAGS)" -o $@ ./cmd/$$1

.PHONY: images
images: go-present ## build the project's own test images, and the guestd of the tests
	@mkdir -p $(IMAGES) $(GUESTD)
	@$(GO) run ./test/image/cmd/mkimage -all $(IMAGES)
	@GOOS=linux $(GOBUILD) -ldflags "$(LDFLAGS)" -o $(GUESTD)/guestd ./cmd/guestd

.PHONY: bundle
bundle: guest-kit images ## build a guest with systemd, which tests boot (as root, once; then it is quick)
	@test/env/bundle build $(AGENT_TEST_KIT) $(GUESTD)/guestd $(AGENT_TEST_BUNDLE)

.PHONY: env
env: ## bring up rootless podman and QEMU, or find yours
	@$(ENV) up

.PHONY: demo
ifdef MAC
demo: build images ## the main job, from nothing to a transcript; on a Mac with the guest kit of a release
	@test/demo
else
demo: build images guest-kit env
	@$(ENV) exec test/demo
endif

.PHONY: mac-check
mac-check: ## on a Mac, ten minutes: what works on it, written to bin/mac-check.md (KIT=guest-kit-arm64.tar.gz)
	@tools/mac-check -o bin/mac-check.md $(if $(KIT),--kit "$(KIT)")

.PHONY: test
test: go-present images guest-kit bundle env ## run every test, on real podman and in real virtual machines
	@$(MAKE) --no-print-directory guest-kit ARCH=arm64 # what a Mac boots, whatever the host is
	@test/env/translator build $(AGENT_TEST_TRANSLATOR)
	@CGO_ENABLED=1 GOOS=darwin GOARCH=arm64 $(GO) list -deps ./internal/vm/vz >/dev/null # downloads what is type-checked for a Mac
	$(GO) test $(RACE) -tags "$(TAGS)" -exec "$(ENV) exec" -timeout 40m ./...

.PHONY: test-host
test-host: build ## test limits, and restarts under systemd, on a whole host under QEMU
	@test/env/host-test

.PHONY: fuzz
fuzz: go-present ## fuzz each parser for a while (FUZZTIME, 20s)
	@test/fuzz $(or $(FUZZTIME),20s)

.PHONY: bench
bench: build images guest-kit env ## measure, side by side with podman's own command line, QEMU alone and tar
	@for package in cmd/agent internal/image; do \
		$(GO) test -tags "$(TAGS)" -c -o .cache/bench.test ./$$package && \
		(cd $$package && $(ENV) exec $(CURDIR)/.cache/bench.test -test.run '^$$' -test.bench . -test.benchtime 5s -test.timeout 40m) || exit; \
	done

.PHONY: generate
generate: go-present ## generate Go from api/
	@$(TOOL) buf generate

.PHONY: lint
lint: go-present $(LINT) ## everything that reads the source: format, lint, buf, cross-compile
	@$(LINT) run --timeout 10m ./...
	@$(TOOL) buf lint
	@GOOS=darwin CGO_ENABLED=0 $(GO) vet -tags "$(TAGS)" ./...
	@if command -v shellcheck >/dev/null; then shellcheck -x .ci/run tools/mac-check tools/mac-sign test/mac/testdata/* test/demo test/fuzz test/env/podman-env test/env/lib.sh test/env/host test/env/host-test test/env/bundle test/env/translator test/env/selftest test/env/host.d/run-payload test/env/payload/*; fi

$(LINT): tools/lint/go.sum
	@echo "building golangci-lint (once, a few minutes)"
	@mkdir -p $(@D) && cd tools/lint && $(GO) build -o $@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

.PHONY: check-generated
check-generated: generate ## fail if generated code differs from what is committed
	@git diff --exit-code --stat -- api || { echo "run make generate and commit" >&2; exit 1; }
	@test -z "$$(git status --porcelain -- api)" || { git status --short -- api; exit 1; }

.PHONY: breaking
breaking: go-present ## fail if the API broke its promise to older clients (AGAINST, main)
	@$(TOOL) buf breaking --against '.git#branch=$(or $(AGAINST),main)'

.PHONY: clean
clean: ## stop the test environment and remove what was built, caches too
	@$(ENV) down --purge || true
	@rm -rf bin .cache
