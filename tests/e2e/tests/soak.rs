//! Soak test: hundreds of execs and containers in a row.
//!
//! Runs: by name only: it takes longer than all other suites together
use husk_e2e::case;

#[test]
fn two_hundred_sequential_execs_leave_no_process() {
    case("exec-row", |case| {
        let container = case.sleeper();
        for number in 0..200 {
            let text = format!("number {number}");
            container.exec(&format!("r{number}"), &["echo", &text]).expect_clean().expect_out(&text);
        }
        // No process of an exec still runs.
        container.exec("count", &["sh", "-c", "ls -d /proc/[0-9]* | wc -l"]).expect_clean();
        let processes = container.exec("ps", &["sh", "-c", "exec 2>/dev/null; cat /proc/[0-9]*/comm"]).out();
        assert_eq!(processes.lines().filter(|comm| *comm != "cat").collect::<Vec<_>>(), ["sleep"]);
        container.kill();
    });
}

#[test]
fn one_hundred_sequential_containers_run() {
    case("hundred", |case| {
        for number in 0..100 {
            case.busybox(&["echo", &format!("container {number}")])
                .output()
                .expect_clean()
                .expect_out(&format!("container {number}"));
        }
    });
}
