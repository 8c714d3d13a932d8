// The divergences of one instruction set without torch, in double.
#include "cpu/isa/baseline_distillation.cpp"

#include <vector>

using namespace fusedloss;

extern "C" void run_distillation(int divergence, int teacher_is, int64_t rows, int64_t classes, const double* student,
                                 const double* teacher, const int64_t* labels, double temperature, double beta,
                                 double* losses, double* grad_in_forward, double* grad) {
  const auto operand = [&](const double* data) { return RowsOperand{data, DType::Double, classes, 1}; };
  std::vector<double> statistics(kSavedOfPair * rows), scratch(distillation_scratch(classes));
  const double one = 1;
  DistillationArgs args = {};
  args.arithmetic = DType::Double;
  args.rows = rows;
  args.classes = classes;
  args.student = operand(student);
  args.teacher = operand(teacher);
  args.divergence = Divergence(divergence);
  args.teacher_is = TeacherIs(teacher_is);
  args.temperature = temperature;
  args.beta = beta;
  args.labels = labels;
  args.ignore_index = -100;
  args.losses = losses;
  args.statistics = statistics.data();
  args.scale = 1;
  args.upstream = &one;
  args.grad = operand(grad_in_forward);
  baseline::distillation_forward(args, 0, rows, divergence == 0 ? scratch.data() : nullptr);
  args.grad = operand(grad);
  baseline::distillation_backward(args, 0, rows);
}
