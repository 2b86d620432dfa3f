// The kernels for any machine, and those in float64.
#include "tables.h"
#include "vec_portable.h"
#include "kernels.h"

namespace l2l {
const Kernels<float> kPortableFloat = kernels<Portable<float>>();
const Kernels<double> kPortableDouble = kernels<Portable<double>>();
}  // namespace l2l
