// The state of many coordinates by Hopper's copy engine, for the kernel of many coordinates (matrix_step.cu).
//
// A layer of a tile is a box of 32 coordinates by the rows of its h and c: one instruction of one lane brings it, and
// takes it away again when the lanes have put the new state where the old was. So a warp spends next to nothing on
// moving state, and memory meets all rows of a tile at once.
#pragma once

#include "boxes.cuh"
#include "matrix_state.cuh"

namespace l2l {
namespace matrix {
namespace {

// One block on a multiprocessor: with float32 states three warps for each of its four schedulers, with bfloat16 ones,
// which need fewer registers, five.
L2L_HOST_DEVICE constexpr int box_threads(int slots, bool wide) {
  return slots > 5 ? 256 : device::kWarp * (wide ? 12 : 20);
}

// Boxes of a warp: one is worked on while the other comes. More were no faster.
constexpr int kBoxesEach = 2;

// float4s of a lane: for what is below the first layer, and for new h that its state rounds.
L2L_HOST_DEVICE int scratch_slots(const Network& net, int slots, bool wide) {
  return net.projection || !wide ? slots : 1;
}

struct BoxEntry : DenseEntry {
  device::BoxMap boxes;  // of the state, moments included
};

// As Stream, with a ring of `depth` boxes for each warp.
template <int kSlots, class T, class Table, class Tiles>
class BoxStream {
 public:
  using Piece = PieceOf<T>;
  static constexpr int kHidden = 4 * kSlots, kRows = 2 * kHidden;
  static constexpr int kPieces = kWidth / kOwn * kRows, kBytes = kPieces * int(sizeof(Piece));  // of a box
  static constexpr bool kInPlace = sizeof(T) == 4;  // what the next layer has below is the new h as it is stored

  L2L_DEVICE BoxStream(const Table& table, const Network& net, int depth, float4* shared, Tiles& tiles)
      : table_(table), net_(net), depth_(depth), tiles_(tiles), ahead_(tiles()) {
    // Boxes of all warps, scratch of all, arrivals of all: boxes begin on lines of 128 bytes.
    Piece* const boxes = reinterpret_cast<Piece*>(shared);
    float4* const scratch = reinterpret_cast<float4*>(boxes + warps() * depth * kPieces);
    const int slots = scratch_slots(net, kSlots, kInPlace);
    ring_ = boxes + warp() * depth * kPieces;
    scratch_ = scratch + warp() * slots * device::kWarp + device::lane();
    arrivals_ = reinterpret_cast<device::Arrival*>(scratch + warps() * slots * device::kWarp) + warp() * depth;
    if (device::lane() == 0)
      for (int i = 0; i < depth; ++i) device::arrival_begin(arrivals_ + i);
    device::boxes_written();
    __syncwarp();
    for (int i = 0; i + 1 < depth; ++i) send(i);
  }

  // Goes on to the warp's next tile; only what changes of it is stored.
  L2L_DEVICE void advance(const Tile& tile, const Changes& changes) {
    now_ = tile;
    changes_ = changes;
  }

  L2L_DEVICE void begin(int layer) {
    layer_ = layer;
    device::arrival_wait(arrivals_ + place_, parity_);
    box_ = ring_ + place_ * kPieces + Place().q * (kWidth / kOwn) + Place().r;
  }

  // A slot is 4 rows of a box: 32 pieces, as in scratch.
  L2L_DEVICE Four below(int i) const { return to_four(below_[i * device::kWarp]); }
  L2L_DEVICE void put_below(int i, const Four& x) {
    below_ = scratch_;
    set(scratch_[i * device::kWarp], x);
  }

  L2L_DEVICE Four h(int j) const { return to_four(box_[j * device::kWarp]); }

  // The box before this one has been read, the new h in it too: it takes the last one of those sent for.
  L2L_DEVICE void h_read() {
    __syncwarp();
    send(place_ == 0 ? depth_ - 1 : place_ - 1);
  }

  L2L_DEVICE Four c(int j) const { return to_four(box_[(kSlots + j) * device::kWarp]); }

  L2L_DEVICE void keep(int j, const Four& c, const Four& h) {
    set(box_[(kSlots + j) * device::kWarp], c);
    set(box_[j * device::kWarp], h);
    if (!kInPlace) set(scratch_[j * device::kWarp], h);
  }

  L2L_DEVICE void end() {
    if (changes_.all) {
      device::boxes_written();
      __syncwarp();
      if (device::lane() == 0)
        device::box_store(
            table_.entries[now_.entry].boxes, now_.first, net_.moment_rows() + kRows * layer_,
            ring_ + place_ * kPieces);
    } else {
      const Part<T> state = part<T>(table_.entries[now_.entry], now_, net_);
#pragma unroll 1
      for (int j = 0; j < kSlots; ++j) {
        store_some(state.row(kRows * layer_ + 4 * j), h(j), changes_.of_four);
        store_some(state.row(kRows * layer_ + kHidden + 4 * j), c(j), changes_.of_four);
      }
    }
    if constexpr (kInPlace)
      below_ = box_;
    else
      below_ = scratch_;
    if (++place_ == depth_) {
      place_ = 0;
      parity_ ^= 1;
    }
  }

  // Shared memory must outlast the stores that read it.
  L2L_DEVICE void finish() const {
    if (device::lane() == 0) device::box_stores_read();
  }

 private:
  // For the next layer that nobody has sent for, into a box whose store has been read.
  L2L_DEVICE void send(int place) {
    if (ahead_.count > 0 && device::lane() == 0) {
      device::box_stores_read();
      device::box_load(
          ring_ + place * kPieces, table_.entries[ahead_.entry].boxes, ahead_.first,
          net_.moment_rows() + kRows * ahead_layer_, kBytes, arrivals_ + place);
    }
    if (++ahead_layer_ < net_.layers) return;
    ahead_layer_ = 0;
    ahead_ = tiles_();
  }

  const Table& table_;
  const Network& net_;
  const int depth_;
  Tiles& tiles_;
  Tile now_, ahead_;
  Changes changes_;
  Piece *ring_, *box_;  // this warp's boxes; in the current one, this lane's pieces
  float4 *scratch_;
  const float4* below_;
  device::Arrival* arrivals_;
  int place_ = 0, layer_, ahead_layer_ = 0;
  uint32_t parity_ = 0;
};

// What Copies is to Stream.
struct Boxes {
  static constexpr bool kThere = device::kBoxes;
  using Entry = BoxEntry;
  template <int kSlots, class T, class Table, class Tiles>
  using Of = BoxStream<kSlots, T, Table, Tiles>;

  L2L_HOST_DEVICE static constexpr int threads(int slots, bool wide) { return box_threads(slots, wide); }
  L2L_DEVICE static void packed() { device::boxes_written(); }

  static int64_t shared_bytes(const Network& net, DType state, int depth) {
    const bool wide = state == DType::float32;
    const int slots = net.hidden / 4;
    const int64_t box = 2 * net.hidden * kWidth * (wide ? 4 : 2);
    const int64_t scratch = scratch_slots(net, slots, wide) * device::kWarp * int64_t(sizeof(float4));
    return box_threads(slots, wide) / device::kWarp * (depth * (box + int64_t(sizeof(device::Arrival))) + scratch);
  }
  static bool deep_enough(const Network&, DType, int depth) { return depth == kBoxesEach; }
};

}  // namespace
}  // namespace matrix
}  // namespace l2l
