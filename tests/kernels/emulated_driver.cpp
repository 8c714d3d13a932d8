// A driver of the kernels as a program, for processors that only an emulator runs: emulated.py sends calls to its
// standard input, and reads from its standard output what the call returned and all memory that it was given.
//
// DRIVER is the driver's file, FUNCTIONS its functions: CALL(run_pointwise) CALL(run_indexed).
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

#include DRIVER

namespace {

void read_bytes(void* to, size_t count) {
  if (std::fread(to, 1, count, stdin) != count) std::exit(1);
}

void write_bytes(const void* from, size_t count) {
  if (std::fwrite(from, 1, count, stdout) != count) std::exit(1);
}

template <class T>
T read_number() {
  T value;
  read_bytes(&value, sizeof(value));
  return value;
}

using Memory = std::vector<std::vector<char>>;

void* read_memory(Memory& memory) {
  const auto size = read_number<int64_t>();
  if (size < 0) return nullptr;
  memory.emplace_back(size_t(size));
  read_bytes(memory.back().data(), size_t(size));
  return memory.back().data();
}

// One argument of type T: a number, memory behind its size in bytes, or pointers to memory behind their count.
template <class T>
T read_argument(Memory& memory, std::vector<std::vector<void*>>& lists) {
  if constexpr (std::is_arithmetic_v<T>) {
    return read_number<T>();
  } else if constexpr (std::is_pointer_v<std::remove_pointer_t<T>>) {
    lists.emplace_back(size_t(read_number<int64_t>()));
    for (void*& each : lists.back()) each = read_memory(memory);
    return const_cast<T>(lists.back().data());
  } else {
    return static_cast<T>(read_memory(memory));
  }
}

template <class Result, class... Arguments>
void serve(Result (*function)(Arguments...)) {
  Memory memory;
  std::vector<std::vector<void*>> lists;
  const std::tuple<Arguments...> arguments{read_argument<Arguments>(memory, lists)...};  // braces: in order
  double result = 0;
  if constexpr (std::is_void_v<Result>) {
    std::apply(function, arguments);
  } else {
    result = std::apply(function, arguments);
  }
  write_bytes(&result, sizeof(result));
  for (const std::vector<char>& each : memory) write_bytes(each.data(), each.size());
  std::fflush(stdout);
}

}  // namespace

int main() {
  char name[32];  // filled with zeros
  while (std::fread(name, 1, sizeof(name), stdin) == sizeof(name)) {
#define CALL(function) \
  if (std::strcmp(name, #function) == 0) serve(function);
    FUNCTIONS
#undef CALL
  }
}
