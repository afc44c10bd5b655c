// Steps of a Growing NCA on the native kernels, with no JAX: what instructions.py counts.
// Arguments: "forward" or "backward", and how many calls.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.hpp"

using namespace nca;

struct Serial : Pool {
  void run(Index tasks, void (*body)(void*, Index), void* context) override {
    for (Index task = 0; task < tasks; ++task) body(context, task);
  }
};

static std::vector<float> noise(Index count, float scale) {
  static std::uint32_t state = 1;
  std::vector<float> values(count);
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = scale * (static_cast<float>(state >> 8) / 8388608.0f - 1.0f);
  }
  return values;
}

int main(int, char** arguments) {
  const Index side = 32, cells = side * side, channels = 16, perceived = 48, hidden = 128;
  const bool backward = std::strcmp(arguments[1], "backward") == 0;
  const auto state = noise(cells * channels, 1), cotangent = noise(cells * channels, 1);
  const auto taps = noise(9 * perceived, 0.3f);
  const auto weights = noise(perceived * hidden + hidden * channels, 0.1f);
  std::vector<float> new_state(cells * channels), d_state(cells * channels);
  std::vector<float> d_weights(weights.size()), d_biases(hidden + channels);
  const std::vector<float> biases(hidden + channels);
  std::vector<std::uint8_t> alive(cells);

  std::vector<Layer> layers(2);
  Index weight = 0, bias = 0, sizes[] = {perceived, hidden, channels};
  for (int i = 0; i < 2; ++i) {
    layers[i].in = sizes[i], layers[i].out = sizes[i + 1];
    layers[i].weight.data = weights.data() + weight, layers[i].d_weight.data = d_weights.data() + weight;
    layers[i].bias.data = biases.data() + bias, layers[i].d_bias.data = d_biases.data() + bias;
    weight += layers[i].in * layers[i].out, bias += layers[i].out;
  }
  const std::uint32_t key[] = {0, 7};
  Step step{};
  step.groups = step.batch = 1;
  step.size[0] = 1, step.size[1] = step.size[2] = side;
  step.cells = cells, step.channels = channels, step.perceived = perceived;
  step.padding = Padding::zeros, step.perception = Perception::depthwise;
  step.kernel[0] = 1, step.kernel[1] = step.kernel[2] = 3;
  step.before[1] = step.before[2] = 1;
  step.activation = Activation::relu, step.perception_activation = Activation::identity;
  step.step_size = 1;
  step.fire = Fire::key, step.fire_threshold = 1u << 22, step.key.data = key;
  step.alive = true, step.alive_channel = channels - 1, step.alive_radius = 1;
  step.alive_threshold = 0.1f;
  step.layers = layers;
  step.state = state.data(), step.taps.data = taps.data();
  step.new_state = new_state.data(), step.alive_mask = alive.data();

  Serial pool;
  const Kernels& kernels = NCA_ISA::kernels;
  kernels.step_forward(step, pool);  // the backward needs its alive mask
  step.cotangent = cotangent.data(), step.d_state = d_state.data(), step.wants_weights = true;
  for (int call = std::atoi(arguments[2]); call > 0; --call)
    (backward ? kernels.step_backward : kernels.step_forward)(step, pool);
  return 0;
}
