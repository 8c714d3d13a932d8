// Class indices as targets: the pointwise drivers over tiles of a one-hot that never leaves the cache; included once
// per instruction set.

namespace fusedloss::FUSEDLOSS_ISA {

// Targets, weights and logits of a stretch of elements, as the pointwise drivers read them.
template <class S>
class IndexedTile {
 public:
  static constexpr int64_t kElements = 2048;

  S target[kElements];  // 1 in the row's class, 0 elsewhere, -1 in all of an ignored row
  S weight[kElements], input[kElements];

  explicit IndexedTile(const IndexedArgs& args) : args_(args), layout_(args.layout) {}

  // Whether any of the rows is ignored.
  bool fill_targets(int64_t begin, int64_t end) {
    begin_ = begin;
    end_ = end;
    constexpr int64_t kWorthComparing = 32;
    return layout_.inner < kWorthComparing ? fill_by_row() : fill_by_class();
  }

  void fill_weights() {
    const S* weights = static_cast<const S*>(args_.weight);
    if (!weights) {
      copy(&one_, 0, weight, end_ - begin_);
    } else if (layout_.inner == 1) {
      over_runs(layout_.classes, [&](int64_t outer, int64_t class_, int64_t to, int64_t count) {
        copy(weights + weight_offset(outer, class_, 0), args_.weight_class_stride, weight + to, count);
      });
    } else {
      over_runs(layout_.inner, [&](int64_t run, int64_t i, int64_t to, int64_t count) {
        const S* from = weights + weight_offset(run / layout_.classes, run % layout_.classes, i);
        copy(from, args_.weight_inner_stride, weight + to, count);
      });
    }
  }

  // An ignored row's logits, which may be NaN, out of a sum: zeros of weight 0.
  void hide_ignored() {
    const S* from = static_cast<const S*>(args_.input) + begin_;
    for (int64_t i = 0; i < end_ - begin_; ++i) {
      input[i] = zero_if_ignored(target[i], from[i]);
      weight[i] = zero_if_ignored(target[i], weight[i]);
    }
  }

  void clear_ignored() const {
    S* output = static_cast<S*>(args_.output) + begin_;
    for (int64_t i = 0; i < end_ - begin_; ++i) output[i] = zero_if_ignored(target[i], output[i]);
  }

 private:
  // By the target's sign, in the bits: a choice between structs is no vector code.
  static S zero_if_ignored(S target, S value) {
    using Int = std::conditional_t<sizeof(S) == 2, int16_t, std::conditional_t<sizeof(S) == 4, int32_t, int64_t>>;
    return bit_cast<S>(Int(bit_cast<Int>(value) & ~(bit_cast<Int>(target) >> (8 * sizeof(S) - 1))));
  }

  int64_t weight_offset(int64_t outer, int64_t class_, int64_t i) const {
    return outer * args_.weight_outer_stride + class_ * args_.weight_class_stride + i * args_.weight_inner_stride;
  }

  // Each row names one element, or is ignored with all of its own.
  bool fill_by_row() {
    const int64_t classes = layout_.classes, inner = layout_.inner, slab = classes * inner;
    for (int64_t i = 0; i < end_ - begin_; ++i) target[i] = S();
    bool any_ignored = false;
    for (int64_t outer = begin_ / slab; outer * slab < end_; ++outer) {
      for (int64_t i = 0; i < inner; ++i) {
        const int64_t index = args_.index[outer * inner + i], first = outer * slab + i;
        if (index == args_.ignore_index) {
          any_ignored = true;
          const int64_t skipped = first < begin_ ? (begin_ - first + inner - 1) / inner : 0;
          for (int64_t c = skipped; c < classes && first + c * inner < end_; ++c) {
            target[first + c * inner - begin_] = ignored_;
          }
        } else if (index >= 0 && index < classes) {
          const int64_t element = first + index * inner;
          if (element >= begin_ && element < end_) target[element - begin_] = one_;
        }
      }
    }
    return any_ignored;
  }

  // Every element asks whether its row names its class.
  bool fill_by_class() {
    bool any_ignored = false;
    over_runs(layout_.inner, [&](int64_t run, int64_t i, int64_t to, int64_t count) {
      const int64_t outer = run / layout_.classes, class_ = run % layout_.classes;
      const int64_t ignore_index = args_.ignore_index;
      const int64_t* index = args_.index + outer * layout_.inner + i;
      S* named = target + to;
      int ignored = 0;
      for (int64_t k = 0; k < count; ++k) {
        const bool ignore = index[k] == ignore_index;
        ignored |= int(ignore);
        named[k] = ignore ? ignored_ : (index[k] == class_ ? one_ : S());
      }
      any_ignored = any_ignored || ignored;
    });
    return any_ignored;
  }

  // Calls f(run, first of it, place in the tile, count) for the runs of that length that the tile cuts out.
  template <class F>
  void over_runs(int64_t length, F f) const {
    int64_t run = begin_ / length, first = begin_ % length;
    for (int64_t at = begin_; at < end_;) {
      const int64_t left = length - first, count = left < end_ - at ? left : end_ - at;
      f(run, first, at - begin_, count);
      at += count;
      first = 0;
      ++run;
    }
  }

  static void copy(const S* from, int64_t stride, S* to, int64_t count) {
    if (stride == 0) {
      for (int64_t i = 0; i < count; ++i) to[i] = *from;
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
    }
  }

  const S one_ = store<S>(1), ignored_ = store<S>(-1);
  const IndexedArgs& args_;
  const IndexedLayout& layout_;
  int64_t begin_ = 0, end_ = 0;
};

template <class S, class Loss>
double over_tiles(const Loss& loss, PointwiseResult result, const IndexedArgs& args, int64_t begin, int64_t end) {
  const bool sums = result == PointwiseResult::Sum || result == PointwiseResult::SumAndGrad;
  const S *logits = static_cast<const S*>(args.input), *upstream = static_cast<const S*>(args.upstream);
  S* output = static_cast<S*>(args.output);
  IndexedTile<S> tile(args);
  Arrays<S> arrays = {};
  arrays.scale = Accumulate<S>(args.scale) * (upstream && !args.upstream_stride ? load(*upstream) : Accumulate<S>(1));
  double sum = 0;
  for (int64_t first = begin; first < end; first += tile.kElements) {
    const int64_t last = first + tile.kElements < end ? first + tile.kElements : end;
    const bool any_ignored = tile.fill_targets(first, last), hidden = any_ignored && sums;
    if (args.weight || hidden) tile.fill_weights();
    if (hidden) tile.hide_ignored();

    arrays.input = hidden ? tile.input : logits + first;
    arrays.target = tile.target;
    arrays.weight = args.weight || hidden ? tile.weight : nullptr;
    arrays.upstream = args.upstream_stride ? upstream + first : nullptr;
    arrays.output = output ? output + first : nullptr;
    sum += run_arrays<S>(loss, result, arrays, last - first);
    if (any_ignored && result != PointwiseResult::Sum) tile.clear_ignored();
  }
  return sum;
}

inline double indexed(Pointwise loss, PointwiseResult result, const IndexedArgs& args, int64_t begin, int64_t end) {
  return with_indexed_functor(loss, args.dtype, args.params, [&](const auto& functor, auto storage) {
    return over_tiles<decltype(storage)>(functor, result, args, begin, end);
  });
}

}  // namespace fusedloss::FUSEDLOSS_ISA
