// Operands of any dtype and stride. A tile at a time is converted into dense arrays of the arithmetic type, which stay
// in the first-level cache; the losses or the gradient are converted back. An operand that is dense in that type is
// read in place.

#include "groups.inl"

namespace fusedloss::FUSEDLOSS_ISA {

template <class T>
constexpr int64_t kTileElements = 8192 / sizeof(T);  // three of them in a first-level cache of 32 kB

// Calls f(offset, stride, count) for the runs of [begin, end) along the innermost dimension of more than one element.
template <class F>
void over_runs(const PointwiseArgs& args, const int64_t* strides, int64_t begin, int64_t end, F f) {
  int run = 0;
  while (run + 1 < args.dims && args.sizes[run] == 1) ++run;
  int64_t index[kMaxDims] = {}, offset = 0, rest = begin;
  for (int d = run; d < args.dims; ++d) {
    index[d] = rest % args.sizes[d];
    rest /= args.sizes[d];
    offset += index[d] * strides[d];
  }
  for (int64_t at = begin; at < end;) {
    const int64_t left = args.sizes[run] - index[run], count = left < end - at ? left : end - at;
    f(offset, strides[run], count);
    at += count;
    offset -= index[run] * strides[run];
    index[run] = 0;
    for (int d = run + 1; d < args.dims; ++d) {  // one row on
      offset += strides[d];
      if (++index[d] < args.sizes[d]) break;
      offset -= index[d] * strides[d];
      index[d] = 0;
    }
  }
}

template <class T>
class PointwiseTile {
 public:
  explicit PointwiseTile(const PointwiseArgs& args)
      : args_(args),
        in_groups_(!args.index && (!args.output || args.output_dtype == DType::BFloat16) && in_groups(args.input) &&
                   in_groups(args.target) && in_groups(args.weight) && in_groups(args.third) &&
                   (args.one_upstream || in_groups(args.upstream))) {}

  bool reads_and_writes_in_place() const {
    return !args_.index && in_place(args_.input) && in_place(args_.target) && in_place(args_.weight) &&
           in_place(args_.third) && (args_.one_upstream || in_place(args_.upstream)) &&
           (!args_.output || args_.output_dtype == kType);
  }

  // The arrays of elements [begin, end), which are a tile at most unless all are in place.
  Arrays<T> read(int64_t begin, int64_t end) {
    Arrays<T> arrays = {};
    arrays.input = operand(args_.input, begin, end, input_);
    if (args_.index) {
      any_ignored_ = one_hot(args_, begin, end, target_);
      arrays.target = target_;
    } else {
      arrays.target = operand(args_.target, begin, end, target_);
    }
    arrays.weight = operand(args_.weight, begin, end, weight_);
    arrays.third = operand(args_.third, begin, end, third_);
    arrays.scale = T(args_.scale);
    if (args_.one_upstream) {
      T upstream;
      with_storage(args_.upstream.dtype,
                   [&](auto s) { widen(static_cast<const decltype(s)*>(args_.upstream.data), 0, 1, &upstream); });
      arrays.scale *= upstream;
    } else {
      arrays.upstream = operand(args_.upstream, begin, end, upstream_);
    }
    arrays.output = args_.output && args_.output_dtype == kType ? static_cast<T*>(args_.output) + begin : output_;
    return arrays;
  }

  bool any_ignored() const { return any_ignored_; }

  // Takes ignored rows, whose logits may be NaN, out of a sum and its gradient: zeros of weight 0.
  void hide_ignored(Arrays<T>& arrays, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const T weight = arrays.weight ? arrays.weight[i] : T(1);
      input_[i] = zero_if_ignored(target_[i], arrays.input[i]);
      weight_[i] = zero_if_ignored(target_[i], weight);
      counted_target_[i] = zero_if_ignored(target_[i], target_[i]);
    }
    arrays.input = input_;
    arrays.target = counted_target_;
    arrays.weight = weight_;
  }

  // Losses and gradients of ignored rows are 0.
  void clear_ignored(const Arrays<T>& arrays, int64_t count) const {
    if (!args_.output) return;
    for (int64_t i = 0; i < count; ++i) arrays.output[i] = zero_if_ignored(target_[i], arrays.output[i]);
  }

  void write(int64_t begin, int64_t end) const {
    if (!args_.output || args_.output_dtype == kType) return;
    with_storage(args_.output_dtype, [&](auto s) {
      using S = decltype(s);
      S* output = static_cast<S*>(args_.output);
      if constexpr (std::is_same_v<T, float> && std::is_same_v<S, bf16>) {
        if (in_groups_) return write_tile<Group>(output_, end - begin, output + begin);
      }
      write_tile<InOrder>(output_, end - begin, output + begin);
    });
  }

 private:
  static constexpr DType kType = sizeof(T) == sizeof(double) ? DType::Double : DType::Float;

  // Whether all are dense bfloat16 numbers, which may as well lie in the order of a group.
  static bool in_groups(const Operand& from) {
    return std::is_same_v<T, float> && (!from.data || (from.dense && from.dtype == DType::BFloat16));
  }

  static bool in_place(const Operand& from) { return !from.data || (from.dense && from.dtype == kType); }

  const T* operand(const Operand& from, int64_t begin, int64_t end, T* tile) const {
    if (!from.data) return nullptr;
    if (in_place(from)) return static_cast<const T*>(from.data) + begin;
    with_storage(from.dtype, [&](auto s) {
      using S = decltype(s);
      const S* data = static_cast<const S*>(from.data);
      if (from.dense) {
        if constexpr (std::is_same_v<T, float> && std::is_same_v<S, bf16>) {
          if (in_groups_) return read_tile<Group>(data + begin, end - begin, tile);
        }
        return read_tile<InOrder>(data + begin, end - begin, tile);
      }
      T* to = tile;
      over_runs(args_, from.strides, begin, end, [&](int64_t offset, int64_t stride, int64_t count) {
        widen(data + offset, stride, count, to);
        to += count;
      });
    });
    return tile;
  }

  // 8 kB and a cache line each: at a distance of a multiple of 4 kB a load would wait for an unrelated store.
  using Numbers = T[kTileElements<T> + 64 / sizeof(T)];

  const PointwiseArgs& args_;
  const bool in_groups_;
  bool any_ignored_ = false;
  alignas(64) Numbers input_, target_, counted_target_, weight_, third_, upstream_, output_;
};

template <class T, class Loss>
double over_tiles(const Loss& loss, PointwiseResult result, const PointwiseArgs& args, int64_t begin, int64_t end) {
  PointwiseTile<T> tile(args);
  const int64_t step = tile.reads_and_writes_in_place() ? end - begin : kTileElements<T>;
  const bool checks = result == PointwiseResult::CheckDomain;
  const bool sums = result == PointwiseResult::Sum || result == PointwiseResult::SumAndGrad;
  double sum = 0;
  for (int64_t first = begin; first < end; first += step) {
    const int64_t last = first + step < end ? first + step : end;
    Arrays<T> arrays = tile.read(first, last);
    if (tile.any_ignored() && (sums || checks)) tile.hide_ignored(arrays, last - first);
    const double of_tile = run_arrays<T>(loss, result, arrays, last - first);
    if (tile.any_ignored()) tile.clear_ignored(arrays, last - first);
    sum = checks ? (sum > of_tile ? sum : of_tile) : sum + of_tile;
    if (!checks) tile.write(first, last);
  }
  return sum;
}

template <template <class> class Functor, class T>
double pointwise_in(PointwiseResult result, const PointwiseArgs& args, int64_t begin, int64_t end) {
  if constexpr (has_positive_weight<Functor<T>>) {
    if (args.third.data) {
      return over_tiles<T>(typename Functor<T>::WithPositiveWeight(), result, args, begin, end);
    }
  }
  if constexpr (takes_third<Functor<T>>) {
    if (!args.third.data) {
      const T one = 1;
      PointwiseArgs complete = args;
      complete.third = {&one, sizeof(T) == sizeof(double) ? DType::Double : DType::Float, false, {}};
      return pointwise_in<Functor, T>(result, complete, begin, end);
    }
  }
  return with_specialised<Functor<T>>(
      args.params, T(), [&](const auto& loss, T) { return over_tiles<T>(loss, result, args, begin, end); });
}

// A loss over elements [begin, end).
template <template <class> class Functor>
double pointwise(PointwiseResult result, const PointwiseArgs& args, int64_t begin, int64_t end) {
  return args.arithmetic == DType::Double ? pointwise_in<Functor, double>(result, args, begin, end)
                                          : pointwise_in<Functor, float>(result, args, begin, end);
}

}  // namespace fusedloss::FUSEDLOSS_ISA
