// Class indices as targets: a tile of a one-hot that never leaves the cache; included once per instruction set.

namespace fusedloss::FUSEDLOSS_ISA {

// What stands in the tile for every element of an ignored row.
template <class T>
constexpr T kIgnored = -1;

// Decides by the target's sign bit: a comparison between structs of half types would be no vector code.
template <class T>
T zero_if_ignored(T target, T value) {
  using Int = typename Constants<T>::Int;
  return bit_cast<T>(Int(bit_cast<Int>(value) & ~(bit_cast<Int>(target) >> (8 * sizeof(T) - 1))));
}

// Every row names one element, or is ignored with all of its own.
template <class T>
bool one_hot_by_row(const PointwiseArgs& args, int64_t begin, int64_t end, T* target) {
  const int64_t inner = args.sizes[0], classes = args.sizes[1], slab = classes * inner;
  for (int64_t i = 0; i < end - begin; ++i) target[i] = T(0);
  bool any_ignored = false;
  for (int64_t outer = begin / slab; outer * slab < end; ++outer) {
    for (int64_t i = 0; i < inner; ++i) {
      const int64_t index = args.index[outer * inner + i], first = outer * slab + i;
      if (index == args.ignore_index) {
        any_ignored = true;
        const int64_t skipped = first < begin ? (begin - first + inner - 1) / inner : 0;
        for (int64_t c = skipped; c < classes && first + c * inner < end; ++c) {
          target[first + c * inner - begin] = kIgnored<T>;
        }
      } else if (index >= 0 && index < classes) {
        const int64_t element = first + index * inner;
        if (element >= begin && element < end) target[element - begin] = T(1);
      }
    }
  }
  return any_ignored;
}

// Every element asks whether its row names its class.
template <class T>
bool one_hot_by_class(const PointwiseArgs& args, int64_t begin, int64_t end, T* target) {
  const int64_t inner = args.sizes[0], classes = args.sizes[1], ignore_index = args.ignore_index;
  bool any_ignored = false;
  for (int64_t at = begin; at < end;) {
    const int64_t run = at / inner, i = at % inner;
    const int64_t count = inner - i < end - at ? inner - i : end - at;
    const int64_t class_ = run % classes, *index = args.index + run / classes * inner + i;
    T* named = target + (at - begin);
    int ignored = 0;
    for (int64_t k = 0; k < count; ++k) {
      const bool ignore = index[k] == ignore_index;
      ignored |= int(ignore);
      named[k] = ignore ? kIgnored<T> : (index[k] == class_ ? T(1) : T(0));
    }
    any_ignored = any_ignored || ignored;
    at += count;
  }
  return any_ignored;
}

// Writes the targets of elements [begin, end) and returns whether a row among them is ignored.
template <class T>
bool one_hot(const PointwiseArgs& args, int64_t begin, int64_t end, T* target) {
  constexpr int64_t kWorthComparing = 32;  // rows side by side
  return args.sizes[0] < kWorthComparing ? one_hot_by_row(args, begin, end, target)
                                         : one_hot_by_class(args, begin, end, target);
}

}  // namespace fusedloss::FUSEDLOSS_ISA
