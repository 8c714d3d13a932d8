"""Compiles csrc/losses/functions.h and measures how far each function is from its exact result, all roundings included.

    python tools/accuracy.py [csrc folder]

It prints the largest error and the root of the mean square, in units in the last place; correct rounding alone leaves
half a unit. It measures every 13th float of the range, and two million doubles. The exact result is the C library's in
the next wider type. Each function is compiled twice: for any machine, and for this one, where a fused multiply-add may
round differently. That takes about a minute.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"

# Name, what is measured (of x, in T), what is exact (of w, in the wider type W), and the range.
FUNCTIONS = [
    ("exp of x <= 0", "exp(x)", "std::exp(w)", "-87", "-1e-6"),
    ("expm1 of x <= 0", "exp_and_expm1(x).minus_one", "std::expm1(w)", "-87", "-1e-6"),
    ("log", "log(x)", "std::log(w)", "1e-30", "1e30"),
    ("log1p", "log1p(x)", "std::log1p(w)", "1e-6", "1e30"),
    ("power", "power(x, T(2.5))", "std::pow(w, W(2.5))", "1e-10", "1"),
    ("sigmoid", "sigmoid(x).p", "1 / (1 + std::exp(-w))", "-80", "-1e-6"),
    ("1 - sigmoid", "sigmoid(x).q", "1 / (1 + std::exp(w))", "-80", "-1e-6"),
    ("softplus(-|x|)", "sigmoid(x).softplus", "std::log1p(std::exp(w))", "-80", "-1e-6"),
    ("exp", "functions::exp(x)", "std::exp(w)", "1e-6", "88"),
    ("expm1", "functions::expm1(x)", "std::expm1(w)", "1e-6", "88"),
    ("sinh", "functions::sinh(x)", "std::sinh(w)", "1e-6", "88"),
    ("cosh", "functions::cosh(x)", "std::cosh(w)", "1e-6", "88"),
    ("tanh", "functions::tanh(x)", "std::tanh(w)", "1e-6", "20"),
    ("log_cosh", "functions::log_cosh(x)", "log_cosh(w)", "1e-6", "1e4"),
    ("pow", "functions::pow(x, T(7.3))", "std::pow(w, W(T(7.3)))", "1e-4", "1e4"),
]

SOURCE = """
#include <cmath>
#include <cstdio>
#include <losses/functions.h>

namespace fusedloss::baseline {
template <class W>
W log_cosh(W x) {
  const W root = std::sinh(x / 2);  // cosh(x) = 1 + 2 sinh(x / 2)^2
  return x < 20 ? std::log1p(2 * root * root) : x - std::log(W(2)) + std::log1p(std::exp(-2 * x));
}

// low and high are of one sign, so that the bits of the numbers between them count up or down.
template <class T, class W, class Measured, class Exact>
void measure(const char* name, T low, T high, Measured measured, Exact exact) {
  using Int = typename Constants<T>::Int;
  const Int first = bit_cast<Int>(low < 0 ? high : low), last = bit_cast<Int>(low < 0 ? low : high);
  const Int step = sizeof(T) == 4 ? 13 : (last - first) / 2'000'003;
  W worst = 0, squares = 0;
  T at = 0;
  long count = 0;
  for (Int bits = first; bits <= last; bits += step, ++count) {
    const T x = bit_cast<T>(bits);
    const W right = exact(W(x));
    const W unit = std::ldexp(W(1), std::ilogb(right) - Constants<T>::mantissa);
    const W error = std::fabs(W(measured(x)) - right) / unit;
    squares += error * error;
    if (error > worst) worst = error, at = x;
  }
  std::printf("%-16s %-7s %8.3f %8.4f   at %.9g\\n", name, sizeof(T) == 4 ? "float" : "double", double(worst),
              double(std::sqrt(squares / count)), double(at));
}

template <class T, class W>
void measure_all() {
LINES
}
}  // namespace fusedloss::baseline

int main() {
  fusedloss::baseline::measure_all<float, double>();
  fusedloss::baseline::measure_all<double, long double>();
}
"""


def main(csrc: Path) -> None:
    lines = [
        f'measure<T, W>("{name}", {low}, {high}, [](T x) {{ return {measured}; }}, [](W w) {{ return {exact}; }});'
        for name, measured, exact, low, high in FUNCTIONS
    ]
    for machine, flags in (("any machine", []), ("this machine", ["-march=native"])):
        with tempfile.TemporaryDirectory() as folder:
            source, program = Path(folder, "accuracy.cpp"), Path(folder, "accuracy")
            source.write_text(SOURCE.replace("LINES", "\n".join(lines)))
            compiler = os.environ.get("CXX", "c++")
            command = [compiler, "-std=c++20", "-O2", *flags, f"-I{csrc}", str(source), "-o", str(program)]
            subprocess.run(command, check=True)
            print(f"Compiled for {machine}\n{'function':16} {'type':7} {'largest':>8} {'mean':>8}", flush=True)
            subprocess.run([str(program)], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else CSRC)
