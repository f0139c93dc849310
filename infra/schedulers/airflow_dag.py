"""An Airflow 3 DAG that looks once an hour: a file for the dags folder; Fresco is installed where the worker runs.

BashOperator is of apache-airflow-providers-standard. On a cluster let the command be the `ray job submit ...` of
infra/kubernetes/retrain-cronjob.yaml.
"""

from datetime import datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

with DAG(
    dag_id="fresco_retrain",
    schedule="17 * * * *",
    start_date=datetime(2026, 1, 1),
    # One look makes up for all that were missed; two at once would meet at the lease, and one would leave.
    catchup=False,
    max_active_runs=1,
    tags=["fresco"],
):
    BashOperator(
        task_id="retrain",
        bash_command="/opt/fresco/.venv/bin/fresco retrain --once --config /etc/fresco/fresco.yaml --json",
        # The same command continues what a killed one left.
        retries=1,
        retry_delay=timedelta(minutes=5),
        execution_timeout=timedelta(hours=12),
        append_env=True,
    )
