//! `ctr task exec`: execs with and without a terminal, and several execs at the same time.
use husk_e2e::case;
use husk_e2e::command::{Input, Running};
use husk_e2e::pty::Terminal;

#[test]
fn exec_joins_container_and_returns_exit_code() {
    case("exec", |case| {
        let container = case.container(case.sh("touch /tmp/mark; hostname inner; echo up; exec sleep 1000"));
        container.exec("e1", &["ls", "/tmp/mark"]).expect_clean().expect_out("/tmp/mark");
        container.exec("e2", &["sh", "-c", "echo out; echo err >&2; exit 7"]).expect_code(7);
        container.exec_with("e3", &["--cwd", "/home/tester"], &["pwd"]).expect_out("/home/tester");
        container
            .exec_with("e4", &["--user", "1000:1000"], &["sh", "-c", "id -u; id -g; cat /home/tester/mine"])
            .expect_out("1000\n1000\ntester's own");
        // The exec is a separate process in the container's namespaces, and has the container's environment.
        container
            .exec("e5", &["sh", "-c", "test $$ -ne 1 && cat /proc/1/comm; echo $IMAGE"])
            .expect_out("sleep\nbusybox");
        let mut running = Running::start(container.exec_command("e6", &[], &["cat"]), Input::Pipe);
        running.write(b"through exec\n");
        running.wait_for("through exec");
        running.close_stdin();
        running.wait().expect_clean();
        let failed = container.exec("e7", &["/no/such/program"]);
        failed.expect_error(&["exec: \"/no/such/program\": stat /no/such/program: no such file or directory"]);
        // A failed exec does not change the container.
        container.exec("e8", &["true"]).expect_clean();
        container.kill();
    });
}

#[test]
fn exec_with_terminal_sees_resize() {
    case("exec-tty", |case| {
        let container = case.sleeper();
        let script = "tty; while [ \"$(stty size 2>/dev/null)\" != '25 81' ]; do sleep 0.1; done
            trap 'echo resized to $(stty size)' WINCH
            echo up; while :; do read line || continue; case $line in end) exit 6;; esac; done";
        let command = container.exec_command("t1", &["--tty"], &["sh", "-c", script]);
        let mut terminal = Terminal::start(command, 25, 81);
        terminal.running.wait_for("/dev/pts/");
        terminal.running.wait_for("up");
        terminal.resize(40, 120);
        terminal.running.wait_for("resized to 40 120");
        terminal.type_text("end\n");
        terminal.running.wait().expect_code(6);
        container.kill();
    });
}

#[test]
fn eight_concurrent_execs_keep_output_apart() {
    case("exec-many", |case| {
        let container = case.sleeper();
        let script =
            |number: usize| format!("read line; for i in $(seq 1 200); do echo {number} $line $i; done; exit {number}");
        let mut all: Vec<Running> = (0..8)
            .map(|number| {
                let command = container.exec_command(&format!("m{number}"), &[], &["sh", "-c", &script(number)]);
                Running::start(command, Input::Pipe)
            })
            .collect();
        for (number, running) in all.iter_mut().enumerate() {
            running.write(format!("line-{number}\n").as_bytes());
        }
        for (number, running) in all.into_iter().enumerate() {
            let output = running.wait().expect_code(i32::try_from(number).unwrap());
            let expected: String = (1..=200).map(|i| format!("{number} line-{number} {i}\n")).collect();
            assert!(output.out() == expected, "wrong output of exec {number}\n{}", output.describe());
        }
        container.kill();
    });
}
