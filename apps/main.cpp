#include <malloc.h>

#include <cstdio>
#include <exception>
#include <iostream>

#include <c10/util/Exception.h>
#include <CLI/CLI.hpp>

#include "commands.h"
#include "hymoe/config/version.h"

namespace {

// The first line of a text: errors are one line, and LibTorch appends its stack to some of them.
std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

int fail(const std::string& text) {
  std::cerr << "hymoe: " + first_line(text) + "\n";  // one write: other ranks may have something to say too
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  // Training frees and allocates the same large buffers every step. Kept by the process they cost no page
  // faults.
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  mallopt(M_TOP_PAD, 64 << 20);

  CLI::App program("hymoe: training of hybrid token/segment Mixture-of-Experts language models", "hymoe");
  program.set_version_flag("--version", hymoe::kVersion);
  program.require_subcommand(1);
  hymoe::add_prepare(program);
  hymoe::add_upcycle(program);
  hymoe::add_grow(program);
  hymoe::add_plan(program);
  hymoe::add_train(program);
  hymoe::add_eval(program);
  hymoe::add_generate(program);
  hymoe::add_score(program);
  hymoe::add_tokenize(program);
  hymoe::add_inspect(program);
  hymoe::add_export(program);
  hymoe::add_config(program);
  try {
    program.parse(argc, argv);
    std::cout.flush();
    if (!std::cout || std::fflush(stdout) != 0 || std::ferror(stdout) != 0)
      return fail("standard output: cannot write");
    return 0;
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return program.exit(error);  // --help, --version
    std::cerr << "hymoe: " << first_line(error.what()) << " (see hymoe --help)" << std::endl;
    return 2;
  } catch (const c10::Error& error) {
    return fail(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return fail(error.what());
  }
}
