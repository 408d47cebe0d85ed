// The calls that XLA makes. Their operands are in the order in which `operands.py` has them.

#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"
#include "chosen.h"
#include "products.h"
#include "rows.h"
#include "scores.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using chunks::Ints;

// Takes one operand after another.
class Operands {
 public:
  explicit Operands(ffi::RemainingArgs all) : all_(all) {}

  ffi::AnyBuffer any() {
    auto next = all_.get<ffi::AnyBuffer>(index_++);
    if (!next.has_value()) throw std::runtime_error("there are fewer operands than expected");
    return *next;
  }

  ffi::AnyBuffer of(ffi::DataType type) {
    ffi::AnyBuffer next = any();
    if (next.element_type() != type)
      throw std::runtime_error("operand " + std::to_string(index_ - 1) + " has another type than expected");
    return next;
  }

  const int32_t* ints(int64_t* size = nullptr) {
    ffi::AnyBuffer next = of(ffi::S32);
    if (size) *size = next.element_count();
    return next.element_count() ? next.typed_data<int32_t>() : nullptr;
  }

  // An array whose first axis is over windows.
  Ints by_window(int64_t* windows = nullptr) {
    ffi::AnyBuffer next = of(ffi::S32);
    if (next.element_count() == 0) return {};
    if (windows) *windows = next.dimensions()[0];
    return {next.typed_data<int32_t>(), (int64_t)next.element_count() / next.dimensions()[0]};
  }

 private:
  ffi::RemainingArgs all_;
  size_t index_ = 0;
};

chunks::Type type_of(ffi::AnyBuffer buffer) {
  switch (buffer.element_type()) {
    case ffi::F32: return chunks::Type::float32;
    case ffi::BF16: return chunks::Type::bfloat16;
    case ffi::F16: return chunks::Type::float16;
    default: throw std::runtime_error("an operand must be float32, bfloat16 or float16");
  }
}

// Calls `with` with an element of the type that a buffer has.
template <class With>
void with_element(ffi::AnyBuffer buffer, const With& with) {
  switch (type_of(buffer)) {
    case chunks::Type::float32: return with(0.0f);
    case chunks::Type::bfloat16: return with(chunks::BFloat16{});
    case chunks::Type::float16: return with(chunks::Float16{});
  }
}

// Runs tasks on XLA's threads.
chunks::Schedule schedule_on(ffi::ThreadPool& threads) {
  return [&threads](auto task) { threads.Schedule(std::move(task)); };
}

// The keys of an encoded pool, or its values: four arrays, of which some may be empty.
chunks::Codes codes_of(Operands& operands, const int64_t* format, int64_t layer, int chunk_size,
                       int dim, int64_t* heads) {
  chunks::Codes codes;
  codes.kind = (chunks::Codes::Kind)format[0];
  codes.bits = format[1];
  codes.by_token = format[2] != 0;
  codes.chunk_size = chunk_size;
  codes.dim = dim;
  ffi::AnyBuffer all = operands.of(ffi::U8), scale = operands.any(), zero = operands.any();
  ffi::AnyBuffer first = operands.of(ffi::U8);
  auto sizes = all.dimensions();  // layers, heads, chunks, ...
  *heads = sizes[1];
  codes.chunks = sizes[2];
  layer = std::clamp<int64_t>(layer, 0, sizes[0] - 1);
  auto of_layer = [&](auto* from, ffi::AnyBuffer buffer) {
    return buffer.element_count() ? from + layer * (buffer.element_count() / sizes[0]) : nullptr;
  };
  bool affine = codes.kind == chunks::Codes::affine;
  codes.groups = affine ? scale.dimensions()[codes.by_token ? 4 : 3] : 1;
  codes.codes = of_layer(all.typed_data<uint8_t>(), all);
  codes.scale = of_layer((const chunks::Float16*)scale.untyped_data(), scale);
  codes.zero = of_layer((const chunks::Float16*)zero.untyped_data(), zero);
  codes.float_scale = of_layer((const float*)scale.untyped_data(), scale);
  codes.first = of_layer(first.typed_data<uint8_t>(), first);
  return codes;
}

// Adds the units of a window, of chunks of so many tokens.
using Add = std::function<void(chunks::Units&, int window, int chunk_size)>;

// What both calls begin with: queries, windows of heads, layer, items, and what windows hide.
struct Common {
  chunks::Attention call;
  chunks::Plan plan;
  int64_t layer;

  Common(Operands& operands, float scale, float softcap, bool batch_invariant,
         ffi::Result<ffi::AnyBuffer> output) {
    ffi::AnyBuffer q = operands.of(ffi::F32);
    call.scale = scale;
    call.softcap = softcap;
    call.batch_invariant = batch_invariant;
    call.queries = q.typed_data<float>();
    call.output = output->typed_data<float>();
    call.query_heads = q.dimensions()[1];
    call.dim = q.dimensions()[2];
    call.head_windows = operands.ints();
    layer = *operands.ints();
    plan.rows = q.dimensions()[0];
    chunks::Items& items = plan.items;
    items.row_begin = operands.by_window();
    items.row_count = operands.by_window();
    items.chunk_begin = operands.by_window();
    items.chunk_count = operands.by_window();
    items.chunks = operands.by_window();
    int64_t windows = 1;
    items.count = operands.by_window(&windows);
    plan.windows = windows;
    chunks::Hidden& hidden = plan.hidden;
    hidden.size = operands.by_window();
    hidden.sinks = operands.by_window();
    hidden.begin = operands.by_window();
    hidden.offset = operands.by_window();
  }

  // `codes` is empty where chunks are stored as they are; else it has the tokens of a chunk, and
  // kind, bits and direction of the codes of keys and of values.
  ffi::Error attend(ffi::ThreadPool threads, Operands& operands, ffi::Span<const int64_t> codes,
                    const chunks::ExactTokens& exact, const Add& add) {
    auto with = [&](const auto& stored, int64_t kv_heads) {
      call.kv_heads = kv_heads;
      std::vector<chunks::Units> units;
      for (int window = 0; window < plan.windows; window++) {
        units.emplace_back(plan.rows, call.group(), stored.chunk_size, call.batch_invariant);
        add(units.back(), window, stored.chunk_size);
      }
      chunks::attend(call, plan.rows, units, stored, exact, threads.num_threads(),
                     schedule_on(threads));
    };
    if (codes.size()) {
      chunks::CodedPool stored;
      int64_t heads;
      stored.chunk_size = codes[0];
      stored.dim = call.dim;
      stored.keys = codes_of(operands, codes.begin() + 1, layer, codes[0], call.dim, &heads);
      stored.values = codes_of(operands, codes.begin() + 4, layer, codes[0], call.dim, &heads);
      stored.chunks = stored.keys.chunks;
      with(stored, heads);
    } else {
      with_exact(operands, with);
    }
    return ffi::Error::Success();
  }

 private:
  template <class With>
  void with_exact(Operands& operands, const With& with) {
    ffi::AnyBuffer keys = operands.any(), values = operands.any();
    auto sizes = keys.dimensions();  // layers, heads, chunks, tokens, dim
    int64_t of_layer = sizes[1] * sizes[2] * sizes[3] * sizes[4];
    int64_t at = std::clamp<int64_t>(layer, 0, sizes[0] - 1) * of_layer;
    with_element(keys, [&](auto element) {
      using T = decltype(element);
      const T *k = (const T*)keys.untyped_data() + at, *v = (const T*)values.untyped_data() + at;
      with(chunks::ExactPool<T>{k, v, sizes[2], (int)sizes[3], (int)sizes[4]}, sizes[1]);
    });
  }
};

chunks::ExactTokens exact_tokens(ffi::AnyBuffer keys, ffi::AnyBuffer values) {
  chunks::ExactTokens exact;
  exact.type = type_of(keys);
  exact.keys = keys.untyped_data();
  exact.values = values.untyped_data();
  return exact;
}

// Reads the operands of a plan, and of exact tokens beside the pool; what it returns adds their units.
using ReadPlan = Add (*)(Operands&, const Common&, chunks::ExactTokens*);

Add read_decoding(Operands& operands, const Common& common, chunks::ExactTokens* own) {
  chunks::DecodePlan plan;
  plan.private_chunks = operands.by_window();
  plan.covered = operands.by_window();
  plan.lengths = operands.ints();
  plan.tile_chunks = operands.by_window();
  plan.tile_rows = operands.by_window();
  plan.tile_count = operands.by_window();
  plan.own_slots = operands.ints();
  ffi::AnyBuffer keys = operands.any(), values = operands.any();
  *own = exact_tokens(keys, values);
  if (plan.own_slots) {
    auto sizes = keys.dimensions();  // layers, heads, slots, tokens, dim
    plan.slots = own->slots = sizes[2];
    int64_t of_layer = sizes[1] * sizes[2] * sizes[3] * sizes[4] * (int64_t)sizeof(float);
    if (own->type != chunks::Type::float32) of_layer /= 2;
    int64_t at = std::clamp<int64_t>(common.layer, 0, sizes[0] - 1) * of_layer;
    own->keys = (const char*)own->keys + at;
    own->values = (const char*)own->values + at;
  }
  return [plan, &common](chunks::Units& units, int window, int chunk_size) {
    add_decoding(units, common.plan, plan, window, chunk_size);
  };
}

Add read_prefill(Operands& operands, const Common& common, chunks::ExactTokens* fresh) {
  chunks::PrefillPlan plan;
  plan.tile_begin = operands.ints(&plan.tiles);
  plan.tile_count = operands.ints();
  plan.tile_position = operands.ints();
  plan.tile_sequence = operands.ints();
  plan.num_tiles = operands.ints();
  plan.own_chunk = operands.by_window();
  plan.tables = operands.by_window();
  ffi::AnyBuffer keys = operands.any(), values = operands.any();
  plan.has_fresh = keys.element_count() > 0;
  *fresh = exact_tokens(keys, values);
  return [plan, &common](chunks::Units& units, int window, int chunk_size) {
    add_prefill(units, common.plan, plan, window, chunk_size);
  };
}

template <ReadPlan read_plan>
ffi::Error attend(ffi::ThreadPool threads, float scale, float softcap, bool batch_invariant,
                  ffi::Span<const int64_t> codes, ffi::RemainingArgs arguments,
                  ffi::Result<ffi::AnyBuffer> output) try {
  Operands operands(arguments);
  Common common(operands, scale, softcap, batch_invariant, output);
  chunks::ExactTokens exact;
  Add add = read_plan(operands, common, &exact);
  return common.attend(threads, operands, codes, exact, add);
} catch (const std::exception& error) {
  return ffi::Error::Internal(error.what());
}

auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Attr<float>("scale")
      .Attr<float>("softcap")
      .Attr<bool>("batch_invariant")
      .Attr<ffi::Span<const int64_t>>("codes")
      .RemainingArgs()
      .Ret<ffi::AnyBuffer>();
}

// Of each query that asks and each head, how well the chunks before it score, as shares of 1: by codes
// of their keys, which have a format as pools do, or else by their bounds.
ffi::Error score(ffi::ThreadPool threads, float scale, float softcap,
                 ffi::Span<const int64_t> codes, ffi::RemainingArgs arguments,
                 ffi::Result<ffi::AnyBuffer> output) try {
  Operands operands(arguments);
  ffi::AnyBuffer q = operands.of(ffi::F32);
  chunks::Attention like;
  like.scale = scale;
  like.softcap = softcap;
  chunks::Asking asking;
  asking.factor = like.factor();
  asking.cap = like.cap();
  asking.queries = q.dimensions()[0];
  asking.query_heads = q.dimensions()[1];
  asking.dim = q.dimensions()[2];
  asking.q = q.typed_data<float>();
  asking.columns = output->dimensions()[2];
  asking.shares = output->typed_data<float>();
  asking.chunk = operands.ints();
  asking.own_column = operands.ints();
  asking.table = operands.ints();
  int64_t size;
  asking.tables = operands.ints(&size);
  asking.sequences = size / std::max<int64_t>(asking.columns, 1);
  for (Ints* of : {&asking.items.row_begin, &asking.items.row_count, &asking.items.chunk_begin,
                   &asking.items.chunk_count, &asking.items.chunks, &asking.items.count})
    of->data = operands.ints(&of->size);
  asking.item_column = operands.ints();
  const int64_t layer = *operands.ints();
  if (asking.queries == 0 || size == 0) return ffi::Error::Success();
  const chunks::Schedule schedule = schedule_on(threads);
  if (codes.size()) {
    int64_t heads;
    chunks::Codes keys = codes_of(operands, codes.begin() + 1, layer, codes[0], asking.dim, &heads);
    asking.kv_heads = heads;
    chunks::score_chunks<chunks::KeyCodes>(asking, keys, threads.num_threads(), schedule);
  } else {
    ffi::AnyBuffer all = operands.of(ffi::F32);
    auto sizes = all.dimensions();  // layers, heads, chunks, 2, dim
    const int64_t at = std::clamp<int64_t>(layer, 0, sizes[0] - 1);
    chunks::Bounds bounds{all.typed_data<float>() + at * (all.element_count() / sizes[0]), sizes[2]};
    asking.kv_heads = sizes[1];
    chunks::score_chunks<chunks::KeyBounds>(asking, bounds, threads.num_threads(), schedule);
  }
  return ffi::Error::Success();
} catch (const std::exception& error) {
  return ffi::Error::Internal(error.what());
}

// Tiles of what rows have chosen, of which each has `counts` columns of its table.
ffi::Error tile(int64_t no_chunk, ffi::Buffer<ffi::S32> chosen, ffi::Buffer<ffi::S32> counts,
                ffi::Buffer<ffi::S32> tables, ffi::ResultBuffer<ffi::S32> tile_chunks,
                ffi::ResultBuffer<ffi::S32> tile_rows, ffi::ResultBuffer<ffi::S32> count) {
  chunks::Chosen all{chosen.dimensions()[0], chosen.dimensions()[1], tables.dimensions()[1],
                     chosen.typed_data(), counts.typed_data(), tables.typed_data()};
  chunks::Tiles tiles{tile_rows->dimensions()[0], tile_rows->dimensions()[1],
                      tile_chunks->typed_data(), tile_rows->typed_data(), count->typed_data()};
  chunks::make_tiles(all, no_chunk, tiles);
  return ffi::Error::Success();
}

// `x` times a layer's weights, of which each row is an output if they are `transposed`.
ffi::Error multiply(ffi::ThreadPool threads, bool transposed, ffi::Buffer<ffi::F32> x,
                    ffi::AnyBuffer weights, ffi::Buffer<ffi::S32> layer,
                    ffi::ResultBuffer<ffi::F32> output) try {
  auto sizes = weights.dimensions();  // layers, and two of which one is summed over
  if (sizes[0] == 0) return ffi::Error::InvalidArgument("there are weights of no layer");
  int64_t at = std::clamp<int64_t>(*layer.typed_data(), 0, sizes[0] - 1) * sizes[1] * sizes[2];
  chunks::Product product;
  product.rows = x.dimensions()[0];
  product.depth = x.dimensions()[1];
  product.columns = sizes[transposed ? 1 : 2];
  product.x = x.typed_data();
  product.output = output->typed_data();
  with_element(weights, [&](auto element) {
    using T = decltype(element);
    auto* run = transposed ? chunks::multiply_transposed<T> : chunks::multiply<T>;
    run(product, (const T*)weights.untyped_data() + at, threads.num_threads(),
        schedule_on(threads));
  });
  return ffi::Error::Success();
} catch (const std::exception& error) {
  return ffi::Error::Internal(error.what());
}

ffi::Error sum_rows(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x,
                    ffi::ResultBuffer<ffi::F32> output) {
  chunks::sum_rows(x.typed_data(), x.dimensions()[0], x.dimensions()[1], output->typed_data(),
                   threads.num_threads(), schedule_on(threads));
  return ffi::Error::Success();
}

ffi::Error exponentials(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x,
                        ffi::Buffer<ffi::F32> most, ffi::ResultBuffer<ffi::F32> output) {
  chunks::exponentials(x.typed_data(), most.typed_data(), x.dimensions()[0], x.dimensions()[1],
                       output->typed_data(), threads.num_threads(), schedule_on(threads));
  return ffi::Error::Success();
}

ffi::Error put_rows(ffi::AnyBuffer array, ffi::AnyBuffer added, ffi::Buffer<ffi::S32> places,
                    ffi::Result<ffi::AnyBuffer> output) {
  // XLA copies the array where someone else still reads it.
  if (array.untyped_data() != output->untyped_data())
    std::memcpy(output->untyped_data(), array.untyped_data(), array.size_bytes());
  int64_t count = places.element_count(), bytes = count ? added.size_bytes() / count : 0;
  if (bytes == 0) return ffi::Error::Success();
  chunks::put_rows((char*)output->untyped_data(), array.size_bytes() / bytes,
                   (const char*)added.untyped_data(), places.typed_data(), count, bytes);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(chunk_attention_decode, attend<read_decoding>, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(chunk_attention_prefill, attend<read_prefill>, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(chunk_shares, score,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<ffi::Span<const int64_t>>("codes")
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(chunk_tiles, tile,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("no_chunk")
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(chunk_product, multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("transposed")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(chunk_row_sums, sum_rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(chunk_row_exponentials, exponentials,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(chunk_pool_put, put_rows,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());
