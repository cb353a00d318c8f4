//! Concurrency: ten containers that run at the same time.
use std::time::Duration;

use husk_e2e::case;
use husk_e2e::command::{Input, Running};

#[test]
fn ten_containers_run_concurrently() {
    case("ten", |case| {
        let mut all: Vec<Running> = (0..10)
            .map(|number| {
                case.sh(&format!("echo up {number}; read line; echo $line {number}; exit {number}")).start(Input::Pipe)
            })
            .collect();
        // All ten containers run before the first container can end.
        for (number, running) in all.iter_mut().enumerate() {
            running.wait_for(&format!("up {number}"));
        }
        for running in &mut all {
            running.write(b"go\n");
        }
        for (number, running) in all.into_iter().enumerate() {
            let output = running.wait_within(Duration::from_secs(120)).expect_code(i32::try_from(number).unwrap());
            assert!(output.out().ends_with(&format!("go {number}\n")), "{}", output.describe());
        }
    });
}
