//! A short form of `cargo xtask chaos`: one fault of each class, in several phases of a pod's life.
use husk_e2e::chaos::Shard;
use husk_e2e::chaos::plan::{Fault, Phase, Step, StepId};
use husk_e2e::cri::pods;

/// The faults. A fault of each class is enough here, because `cargo xtask chaos` runs all pairs.
const FAULTS: [(Phase, Fault); 8] = [
    (Phase::Running, Fault::KillVmm),
    (Phase::CreateContainer, Fault::DropRequest),
    (Phase::Running, Fault::ContainerMemory),
    (Phase::StartContainer, Fault::ShimFds),
    (Phase::StopContainer, Fault::Freeze),
    (Phase::Idle, Fault::LinkDeleted),
    (Phase::StopPodSandbox, Fault::StalledExec),
    (Phase::RunPodSandbox, Fault::ClockForward),
];

#[test]
fn faults_of_all_classes_leave_nothing_and_spare_the_witness() {
    pods("husk-chaos", |pods| {
        let mut shard = Shard::new(pods);
        let mut found = Vec::new();
        for (number, (phase, fault)) in FAULTS.into_iter().enumerate() {
            // The seed 0 marks a step that no plan has.
            let id = StepId { seed: 0, shard: 0, step: number };
            let report = shard.run(Step { id, phase, fault, random: number as u64 });
            found.extend(report.findings.iter().map(|finding| format!("{}: {finding}", report.step)));
            if !report.struck {
                found.push(format!("{}: the fault did not strike: {}", report.step, report.misses.join(", ")));
            }
        }
        assert!(found.is_empty(), "{}", found.join("\n"));
    });
}
