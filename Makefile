# The commands of this repository; `make help` lists them. What `make test` does is in scripts/test.

.DEFAULT_GOAL := help
.PHONY: help demo test bench doc fmt

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: ## a pod network of three nodes on this machine; options in ARGS, for instance ARGS=--help
	@cargo run --quiet --release -p podnet-examples $(if $(findstring etcd,$(ARGS)),,--no-default-features) --example cluster -- $(ARGS)

test: ## all that CI checks; V=1 shows the output of every step
	@bash scripts/test

bench: ## the measurements, each beside its floor
	@cargo bench -p podnet-benches

doc: ## the API documentation, in target/doc
	@cargo doc --no-deps --workspace --all-features

fmt: ## formats the code
	@cargo fmt --all
