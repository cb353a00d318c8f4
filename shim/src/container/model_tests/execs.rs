//! Execs that wait for their turn, because the agent does not create earlier execs.

use std::time::Duration;

use husk_proto::containerd::api::{ExecProcessRequest, StartRequest, StartResponse};
use protobuf::well_known_types::any::Any;
use tokio::task::JoinHandle;

use super::model::{BUDGET, Model, within};
use crate::vm::agent::timeouts;

/// The number of processes that the agent creates at the same time.
const TURNS: usize = 32;
/// The exec that waits for its turn.
pub const LAST_EXEC: &str = "last";

/// Starts as many execs of the container `a` as there are turns, and then [`LAST_EXEC`]. Returns the start of the
/// latter. The agent does not answer the method `exec`.
pub async fn start_more_execs_than_turns(model: &Model) -> JoinHandle<ttrpc::Result<StartResponse>> {
    model.script.hang("exec");
    for number in 0..TURNS {
        drop(begin_exec(model, &format!("e{number}")).await);
    }
    begin_exec(model, LAST_EXEC).await
}

/// Adds an exec to the container `a`, and begins to start it. The clock of the test must be paused.
pub async fn begin_exec(model: &Model, exec: &str) -> JoinHandle<ttrpc::Result<StartResponse>> {
    let spec = Any { value: br#"{ "args": ["true"], "cwd": "/" }"#.to_vec(), ..Default::default() };
    let (id, exec_id) = ("a".to_owned(), exec.to_owned());
    let add =
        ExecProcessRequest { id: id.clone(), exec_id: exec_id.clone(), spec: Some(spec).into(), ..Default::default() };
    model.client().exec(within(BUDGET), &add).await.unwrap();
    let (client, start) = (model.client(), StartRequest { id, exec_id, ..Default::default() });
    let started = tokio::spawn(async move { client.start(within(timeouts::SLOW * 2), &start).await });
    tokio::time::sleep(Duration::from_millis(10)).await;
    started
}
