// The state of many coordinates by asynchronous copies of 16 bytes, for the kernel of many coordinates (matrix_step.cu).
#pragma once

#include "matrix_state.cuh"

namespace l2l {
namespace matrix {
namespace {

// One block on a multiprocessor: three warps for each of its four schedulers with 168 registers a thread, or two with
// 255, which the largest size needs.
L2L_HOST_DEVICE constexpr int stream_threads(int slots) { return slots > 5 ? 256 : 384; }

// Layers that a warp may send for ahead of the one that it works on, and bytes that a block should have under way:
// latency times bandwidth asks for some 15 KB a multiprocessor, but a wait must also outlast a crowded memory's moods.
constexpr int kMaxDepth = 4;
constexpr int64_t kUnderWay = 96 << 10;

template <class Piece>
L2L_DEVICE void copy(Piece* shared, const void* global, int bytes) {
  if constexpr (sizeof(Piece) == 16)
    device::copy_16(shared, global, bytes);
  else
    device::copy_8(shared, global, bytes);
}

// The state of a warp's tiles, one after the other, as run_layer wants it. New state waits in shared memory, too, and
// goes out when the layer is done. The mailbox is a ring of `depth` layers: h and c are sent for that many layers before
// they are needed, across tiles. tiles(): the next of the warp's tiles; of no coordinates beyond the last.
template <int kSlots, class T, class Table, class Tiles>
class Stream {
 public:
  using Piece = PieceOf<T>;
  static constexpr int kHidden = 4 * kSlots, kThreads = stream_threads(kSlots);

  L2L_DEVICE Stream(const Table& table, const Network& net, int depth, float4* shared, Tiles& tiles)
      : table_(table),
        net_(net),
        depth_(depth),
        below_(shared + threadIdx.x),
        ring_(reinterpret_cast<Piece*>(shared + kSlots * kThreads) + threadIdx.x),
        tiles_(tiles),
        ahead_(part_of(tiles())) {
#pragma unroll 1
    for (int i = 0; i < depth; ++i) {
      send(0);
      send(kSlots);
      go_on();
    }
  }

  // Goes on to the warp's next tile; only what changes of it is stored.
  L2L_DEVICE void advance(const Tile& tile, const Changes& changes) {
    now_ = part_of(tile);
    changes_ = changes;
  }

  L2L_DEVICE void begin(int layer) {
    row_ = 2 * kHidden * layer;
    wait();
  }

  L2L_DEVICE Four below(int i) const { return to_four(below_[i * kThreads]); }
  L2L_DEVICE void put_below(int i, const Four& x) const { set(below_[i * kThreads], x); }

  L2L_DEVICE Four h(int j) const { return to_four(mailbox()[j * kThreads]); }

  L2L_DEVICE void h_read() const {
    send(0);
    wait();
  }

  L2L_DEVICE Four c(int j) const { return to_four(mailbox()[(kSlots + j) * kThreads]); }

  L2L_DEVICE void keep(int j, const Four& c, const Four& h) const {
    set(mailbox()[(kSlots + j) * kThreads], c);
    put_below(j, h);
  }

  L2L_DEVICE void end() {
    if (changes_.all) {
#pragma unroll
      for (int j = 0; j < kSlots; ++j) {
        set(*reinterpret_cast<Piece*>(now_.row(row_ + 4 * j)), below(j));
        *reinterpret_cast<Piece*>(now_.row(row_ + kHidden + 4 * j)) = mailbox()[(kSlots + j) * kThreads];
      }
    } else {
#pragma unroll 1
      for (int j = 0; j < kSlots; ++j) {
        store_some(now_.row(row_ + 4 * j), below(j), changes_.of_four);
        store_some(now_.row(row_ + kHidden + 4 * j), c(j), changes_.of_four);
      }
    }
    send(kSlots);
    go_on();
  }

  // Those of no bytes that were sent for beyond the last tile.
  L2L_DEVICE void finish() const { device::copies_landed<0>(); }

 private:
  L2L_DEVICE Part<T> part_of(const Tile& tile) const { return part<T>(table_.entries[tile.entry], tile, net_); }

  L2L_DEVICE Piece* mailbox() const { return ring_ + place_ * 2 * kSlots * kThreads; }

  // A group of copies into the current mailbox: of the layer ahead its h (half 0) or c (half kSlots), a piece a slot.
  L2L_DEVICE void send(int half) const {
    const int row = 2 * kHidden * ahead_layer_ + 4 * half;
#pragma unroll
    for (int j = 0; j < kSlots; ++j)
      copy(&mailbox()[(half + j) * kThreads], ahead_.row(row + 4 * j), ahead_.count * int(sizeof(T)));
    device::copies_end();
  }

  // The next mailbox, and the next layer to send for.
  L2L_DEVICE void go_on() {
    if (++place_ == depth_) place_ = 0;
    if (++ahead_layer_ < net_.layers) return;
    ahead_layer_ = 0;
    ahead_ = part_of(tiles_());
  }

  // For what was sent for longest ago: h before begin, c after h_read, with 2 depth - 1 newer groups either time.
  L2L_DEVICE void wait() const {
    switch (depth_) {
      case 1: return device::copies_landed<1>();
      case 2: return device::copies_landed<3>();
      case 3: return device::copies_landed<5>();
      default: return device::copies_landed<2 * kMaxDepth - 1>();
    }
  }

  const Table& table_;
  const Network& net_;
  const int depth_;
  float4* const below_;  // this thread's, [slot][thread], like each mailbox
  Piece* const ring_;    // [depth][h, then c][slot][thread]
  Tiles& tiles_;
  Part<T> now_, ahead_;
  int place_ = 0, ahead_layer_ = 0, row_;
  Changes changes_;
};

// With what the host launches it: the kernel's stream over a table, bytes of shared memory beside the weights.
struct Copies {
  static constexpr bool kThere = true;
  using Entry = DenseEntry;
  template <int kSlots, class T, class Table, class Tiles>
  using Of = Stream<kSlots, T, Table, Tiles>;

  L2L_HOST_DEVICE static constexpr int threads(int slots, bool) { return stream_threads(slots); }
  L2L_DEVICE static void packed() {}

  static int64_t mailbox_bytes(const Network& net, DType state) {  // of one layer
    const int slots = net.hidden / 4;
    return int64_t(2) * slots * stream_threads(slots) * (state == DType::float32 ? 16 : 8);
  }
  static int64_t shared_bytes(const Network& net, DType state, int depth) {
    const int slots = net.hidden / 4;
    return slots * stream_threads(slots) * int64_t(sizeof(float4)) + depth * mailbox_bytes(net, state);
  }
  static bool deep_enough(const Network& net, DType state, int depth) {
    return depth == kMaxDepth || depth * mailbox_bytes(net, state) >= kUnderWay;
  }
};

}  // namespace
}  // namespace matrix
}  // namespace l2l
